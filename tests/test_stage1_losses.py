"""Each term of stage 1 changes the parameters that it should and no others."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from calotype.stage1_vae import models
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.losses import l1, mse
from calotype.stage1_vae.regularizers import KL, VectorQuantization

PARTS = ("encoder", "quant_conv", "quantize", "post_quant_conv", "decoder")


def autoencoder(regularizer, **more):
    more |= {"vq": {"codebook": 16}, "fsq": {"levels": "5,4"}}.get(regularizer, {})
    settings = VaeSettings(source="", out="", width=8, factor=2, latent_channels=2, regularizer=regularizer, **more)
    return models.build(settings, channels=1, size=(8, 8))


def reached(loss, model):
    """The parts of the autoencoder that a loss changes."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    moved = {
        name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    return moved & set(PARTS)


def batch():
    g = torch.Generator().manual_seed(0)
    return torch.rand(4, 1, 8, 8, generator=g) * 2 - 1, torch.randn(4, 2, 4, 4, generator=g)


ENCODER, DECODER = {"encoder", "quant_conv"}, {"post_quant_conv", "decoder"}
TERMS = [
    ("kl", "reconstruction", ENCODER | DECODER),
    ("kl", "kl", ENCODER),
    ("none", "reconstruction", ENCODER | DECODER),
    ("vq", "reconstruction", ENCODER | DECODER),  # the straight-through estimate passes the codebook by
    ("vq", "commitment", ENCODER),  # the codebook follows as a running mean, see test_quantizers.py
    ("fsq", "reconstruction", ENCODER | DECODER),
]


@pytest.mark.parametrize("regularizer, term, expected", TERMS)
@pytest.mark.parametrize("reconstruction", [l1, mse])
def test_a_term_reaches_its_parameters_and_no_others(regularizer, term, expected, reconstruction):
    model, (x, eps) = autoencoder(regularizer), batch()
    out = model(x, eps)
    loss = reconstruction(out.x_hat, x).mean() if term == "reconstruction" else out.terms[term].mean()
    assert reached(loss, model) == expected


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
@pytest.mark.parametrize("fault", ["detach", "no_grad"])
def test_a_planted_fault_is_seen(regularizer, fault):
    """What the test above would miss if it could not fail."""
    model, (x, eps) = autoencoder(regularizer), batch()
    inner = model.regularizer.forward

    def broken(h, eps):
        if fault == "detach":
            z, penalty = inner(h, eps)
            return z.detach(), penalty
        with torch.no_grad():
            return inner(h, eps)

    model.regularizer.forward = broken
    out = model(x, eps)
    assert reached(mse(out.x_hat, x).mean(), model) == DECODER
    assert all(value.requires_grad == (fault == "detach") for value in out.terms.values())


def test_every_parameter_is_trained():
    """DDP would wait for a gradient that never comes."""
    for regularizer in ("kl", "vq", "fsq", "none"):
        model, (x, eps) = autoencoder(regularizer), batch()
        out = model(x, eps)
        (mse(out.x_hat, x) + sum(out.terms.values())).mean().backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_kl_equals_the_closed_form_of_torch():
    h = torch.randn(5, 6, 4, 4)
    mean, logvar = h.chunk(2, 1)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    assert_close(KL()(h, torch.zeros_like(mean))[1]["kl"], expected)


def test_kl_with_a_fixed_deviation():
    h, eps = torch.randn(5, 6, 4, 4), torch.randn(5, 3, 4, 4)
    mean = h[:, :3]
    z, terms = KL(posterior_std=0.1)(h, eps)
    assert_close(z, mean + 0.1 * eps)
    assert_close(terms["kl"], kl_divergence(Normal(mean, 0.1), Normal(0.0, 1.0)).flatten(1).sum(1))


def test_reparameterised_samples_have_the_posterior_s_moments():
    h = torch.tensor([1.0, -2.0, 0.5, -1.0]).reshape(1, 4, 1, 1).expand(20_000, 4, 1, 1)
    z, _ = KL()(h, torch.randn(20_000, 2, 1, 1, generator=torch.Generator().manual_seed(0)))
    assert_close(z.mean((0, 2, 3)), torch.tensor([1.0, -2.0]), atol=0.04, rtol=0)
    assert_close(z.std((0, 2, 3)), torch.tensor([0.25, -0.5]).exp(), atol=0.04, rtol=0)


def test_quantised_latents_are_those_of_diffusers():
    model, (x, _) = autoencoder("vq"), batch()
    vae = model.vae.eval()
    h = vae.encode(x).latents
    stock, _, (_, _, numbers) = vae.quantize(h)
    ours, _ = model.regularizer(h, h)
    assert_close(ours, stock)
    assert torch.equal(model.regularizer.indices(h).flatten(), numbers)
    assert_close(model(x, h).x_hat, vae.decode(h).sample)


def test_straight_through_gradient_is_that_of_the_code():
    codebook = torch.nn.Embedding(16, 2)
    h = torch.randn(3, 2, 4, 4, requires_grad=True)
    z, _ = VectorQuantization(codebook)(h, h)
    gradient = torch.randn_like(z)
    z.backward(gradient)
    assert torch.equal(h.grad, gradient)


def test_reconstruction_losses_are_per_example():
    x = torch.zeros(2, 1, 2, 2)
    x_hat = torch.stack([torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), -1.0)])
    assert_close(l1(x_hat, x), torch.tensor([0.5, 1.0]))
    assert_close(mse(x_hat, x), torch.tensor([0.25, 1.0]))


def test_beta_grows_over_its_warm_up():
    from types import SimpleNamespace

    from calotype.stage1_vae.train import VaeStage

    settings = VaeSettings(source="", out="", beta=4.0, beta_warmup=5000)
    stage = SimpleNamespace(settings=settings, values=8)
    weights = [VaeStage.weights(stage, step)["kl"] * 8 for step in (0, 1, 2500, 5000, 9000)]
    assert weights == [0.0, 4.0 / 5000, 2.0, 4.0, 4.0]
    stage.settings = settings.model_copy(update={"beta_warmup": 0})
    assert VaeStage.weights(stage, 0)["kl"] * 8 == 4.0


@pytest.mark.parametrize("per_sample", [False, True])
def test_free_bits_pull_above_the_floor_only(per_sample):
    mean = torch.tensor([[0.01, 2.0], [0.02, 0.1]]).reshape(2, 2, 1, 1)  # KL_j = mean^2 / 2 at unit variance
    h = torch.cat([mean, torch.zeros_like(mean)], 1).requires_grad_()
    penalty = KL(free_bits=0.5, per_sample=per_sample)(h, torch.zeros_like(mean))[1]["kl"]
    penalty.sum().backward()
    pull = h.grad[:, :2].flatten(1)
    assert (pull[:, 0] == 0).all()  # the first element is below the floor in both examples, and on average
    assert pull[0, 1] == 2.0
    # the second example's own 0.005 nats are below the floor, the batch's mean of 1.0025 is above
    assert pull[1, 1] == (0.0 if per_sample else pytest.approx(0.1))
    expected = [[0.5, 2.0], [0.5, 0.5 if per_sample else 0.005]]
    assert_close(penalty, torch.tensor(expected).sum(1), atol=1e-6, rtol=1e-6)
    assert h.grad[:, 2].abs().max() == 0
