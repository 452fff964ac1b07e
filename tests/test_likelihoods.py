"""Nats against torch.distributions: means over a bin, its true mass, scales in closed form; what asks for them."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Laplace, Normal
from torch.testing import assert_close

from calotype import cli
from calotype.likelihoods import BIN, KINDS, Likelihood, bernoulli
from calotype.stage1_vae import models
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.train import VaeStage

DENSITIES = {"gaussian": Normal, "laplace": Laplace}
POINTS = 4001
NOISE = ((torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS - 0.5) * BIN  # the midpoints of a fine grid


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=4, shape=(2, 3, 5)):
    """8-bit pictures in [-1, 1], in double precision."""
    return torch.randint(0, 256, (count, *shape), generator=generator()).double() / 255 * 2 - 1


def near_and_far(x):
    """Reconstructions from far inside the bin of x to far outside."""
    distance = 10 ** (4 * torch.rand(x.shape, generator=generator(1), dtype=torch.float64) - 4)
    return x + distance * torch.randn(x.shape, generator=generator(2), dtype=torch.float64)


@pytest.mark.parametrize("kind", DENSITIES)
@pytest.mark.parametrize("scale", [0.005, 0.05, 0.5])  # the first is narrower than a bin
def test_nats_are_the_mean_over_dequantisation_noise(kind, scale):
    x = pictures()
    x_hat = near_and_far(x)
    log_prob = DENSITIES[kind](x_hat[..., None], scale).log_prob(x[..., None] + NOISE)
    expected = (-log_prob.mean(-1) - math.log(BIN)).flatten(1).sum(1)
    found = KINDS[kind](x_hat, x, torch.tensor(math.log(scale), dtype=torch.float64))
    assert found.shape == (4,)
    assert_close(found, expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("kind", DENSITIES)
def test_nats_are_never_below_those_of_the_bin_s_mass(kind):
    gaps = []
    for scale in (0.002, 0.01, 0.1, 1.0):
        d = torch.linspace(0, 6 * scale, 101, dtype=torch.float64)
        density = DENSITIES[kind](torch.zeros((), dtype=torch.float64), scale)
        # in the lower tail, where a difference of two small numbers loses nothing
        true = -(density.cdf(BIN / 2 - d) - density.cdf(-BIN / 2 - d)).log()
        found = KINDS[kind](d.reshape(-1, 1, 1, 1), torch.zeros(101, 1, 1, 1), torch.tensor(scale).double().log())
        assert (found - true > -1e-9).all()
        gaps.append((found - true).max().item())
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0.1 and gaps[-1] < 1e-3  # tight where bins are narrow


def test_bernoulli_is_the_cross_entropy_of_the_stated_probability():
    x = pictures()
    x_hat = 2 * torch.rand(x.shape, generator=generator(3), dtype=torch.float64) - 1
    p = 1 / 256 + (1 - 2 / 256) * (x_hat + 1) / 2
    expected = F.binary_cross_entropy(p, (x + 1) / 2, reduction="none").flatten(1).sum(1)
    assert_close(bernoulli(x_hat, x), expected)
    white, black = (torch.exp(-bernoulli(x_hat[:, :1, :1, :1], torch.full((4, 1, 1, 1), v).double())) for v in (1, -1))
    assert_close(white + black, torch.ones(4, dtype=torch.float64))


def test_bernoulli_pulls_back_what_lies_outside():
    x_hat = torch.tensor([-3.0, -1.001, 1.001, 3.0]).reshape(4, 1, 1, 1).requires_grad_()
    for x in (-1.0, 0.2, 1.0):
        target = torch.full((4, 1, 1, 1), x)
        nats = bernoulli(x_hat, target)
        (gradient,) = torch.autograd.grad(nats.sum(), x_hat)
        assert gradient.flatten().tolist() == [-1.0, -1.0, 1.0, 1.0]  # descent goes to the inside
        edge = bernoulli(x_hat.detach().clamp(-1, 1), target)
        assert_close(nats.detach() - edge, torch.tensor([2.0, 0.001, 0.001, 2.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_has_the_sum_of_its_own_values(kind):
    x = pictures()
    x_hat, log_scale = near_and_far(x).clamp(-1, 1), torch.tensor(-2.0, dtype=torch.float64)
    whole = KINDS[kind](x_hat, x, log_scale)
    each = KINDS[kind](x_hat.reshape(-1, 1, 1, 1), x.reshape(-1, 1, 1, 1), log_scale)
    assert_close(whole, each.reshape(4, -1).sum(1))


@pytest.mark.parametrize("kind, power", [("gaussian", 2), ("laplace", 1)])
def test_a_learnt_scale_goes_to_the_mean_error(kind, power):
    x = pictures()
    x_hat = x + 0.05 * torch.randn(x.shape, generator=generator(4), dtype=torch.float64)
    likelihood = Likelihood(kind).double()
    assert likelihood.scale == pytest.approx(0.3)
    optimizer = torch.optim.LBFGS(likelihood.parameters(), max_iter=100, tolerance_grad=1e-12)

    def loss():
        optimizer.zero_grad()
        nats = likelihood(x_hat, x, likelihood.log_scale).mean()
        nats.backward()
        return nats

    for _ in range(5):
        optimizer.step(loss)
    error = (x_hat[..., None] - x[..., None] - NOISE).abs()
    assert likelihood.scale == pytest.approx(error.pow(power).mean().item() ** (1 / power), rel=1e-5)


def test_a_given_scale_stays_and_bernoulli_has_none():
    given, none = Likelihood("gaussian", 0.7), Likelihood("bernoulli")
    assert given.scale == pytest.approx(0.7) and none.scale is None
    assert not any(p.requires_grad for p in (*given.parameters(), *none.parameters()))


# Gradients

ENCODER, DECODER, SCALE = {"encoder", "quant_conv"}, {"post_quant_conv", "decoder"}, {"log_scale"}
REACHED = [
    ("gaussian", "nats", ENCODER | DECODER | SCALE),
    ("laplace", "nats", ENCODER | DECODER | SCALE),
    ("bernoulli", "nats", ENCODER | DECODER),
    ("gaussian", "kl", ENCODER),
    ("laplace", "kl", ENCODER),
    ("bernoulli", "kl", ENCODER),
]


def settings(**more):
    return VaeSettings(source="", out="", width=8, factor=2, latent_channels=2, **more)


@pytest.mark.parametrize("kind, term, expected", REACHED)
def test_a_term_of_the_bound_reaches_its_parameters_and_no_others(kind, term, expected):
    model = models.build(settings(beta=1.0, likelihood=kind), channels=1, size=(8, 8))
    x = torch.rand(4, 1, 8, 8, generator=generator()) * 2 - 1
    out = model(x, torch.randn(4, 2, 4, 4, generator=generator(1)))
    loss = model.likelihood(out.x_hat, x, out.log_scale) if term == "nats" else out.terms["kl"]
    loss.mean().backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert {name.split(".")[1] for name in moved} == expected


# What asks for a bound

ASKED = [
    ({}, None),
    ({"reconstruction": "l1"}, None),
    ({"regularizer": "vq"}, None),
    ({"beta": 1.0}, "gaussian"),
    ({"beta": 0.0}, "gaussian"),
    ({"regularizer": "tc"}, "gaussian"),
    ({"likelihood": "laplace"}, "laplace"),
    ({"beta": 4.0, "likelihood": "bernoulli"}, "bernoulli"),
]


@pytest.mark.parametrize("given, kind", ASKED)
def test_beta_a_likelihood_or_tc_ask_for_a_bound(given, kind):
    model = models.build(settings(**given), channels=1, size=(8, 8))
    assert settings(**given).bound == (kind is not None)
    assert (model.likelihood.kind if model.likelihood else None) == kind


STDS = [
    ({}, 0.1),
    ({"posterior_std": 0.3}, 0.3),
    ({"learn_variance": True}, None),
    ({"beta": 1.0}, None),
    ({"likelihood": "laplace"}, None),
    ({"regularizer": "tc"}, None),
    ({"beta": 1.0, "posterior_std": 0.3}, 0.3),
    ({"beta": 1.0, "posterior_std": 0.3, "learn_variance": True}, None),
]


@pytest.mark.parametrize("given, std", STDS)
def test_the_posterior_s_deviation_is_learnt_in_a_bound_and_fixed_elsewhere(given, std):
    regularizer = models.build(settings(**given), channels=1, size=(8, 8)).regularizer
    h = torch.randn(3, 4, 2, 2, generator=generator())
    found = regularizer(h, torch.ones(3, 2, 2, 2))[0] - regularizer(h, torch.zeros(3, 2, 2, 2))[0]
    assert_close(found, torch.full_like(found, std) if std else (0.5 * h[:, 2:]).exp())


def test_with_beta_1_the_loss_is_the_negative_elbo_per_value():
    stage = SimpleNamespace(settings=settings(beta=1.0), values=64)
    weights = VaeStage.weights(stage, 10**6)
    assert weights["nats"] == 1.0 and weights["kl"] == 1 / 64  # nats come per value already
    stage.settings = settings(likelihood="laplace")
    assert VaeStage.weights(stage, 10**6)["kl"] == 1 / 64
    stage.settings = settings()
    assert VaeStage.weights(stage, 10**6)["kl"] < 0.01 / 64


@pytest.mark.parametrize("bound", [["--beta", "1"], ["--likelihood", "laplace"], ["--regularizer", "tc"]])
@pytest.mark.parametrize("error, likelihood", [("l1", "laplace"), ("mse", "gaussian")])
def test_an_error_in_a_bound_is_refused_in_one_line(bound, error, likelihood, tmp_path, capsys):
    assert cli.main(["train-vae", "shapes", "--out", str(tmp_path / "vae"), "--reconstruction", error, *bound]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--reconstruction {error}" in line and f"--likelihood {likelihood}" in line
    assert not (tmp_path / "vae").exists()
