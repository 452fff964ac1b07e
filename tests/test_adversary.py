"""The adversarial phase: its single pass against the classical two passes, who learns when, and the discriminator."""

import copy
import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from calotype import cli
from calotype.config import parse
from calotype.device import accelerator
from calotype.sheet import read_sheet
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.discriminator import PatchDiscriminator, depth_for, gradient_penalty, hinge
from calotype.stage1_vae.perceptual import GradientFeatures, Lpips
from calotype.stage1_vae.train import VaeStage

MODEL = "--width 8 --factor 2 --latent-channels 2 --batch-size 8 --precision fp32".split()
BIN = 2 / 255


@pytest.fixture(scope="module")
def sheet(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("sheet")
    assert cli.main(["data", str(pictures), "--image-size", "16", "--out", str(out)]) == 0
    return out / "data.json"


def stage_of(sheet, flags, began=0, pretraining=0):
    """A stage whose adversary began at step 0, with a discriminator that is sure of some patches and not of others."""
    words = [str(sheet), *MODEL, "--out", "unused", "--adversarial", "0.5", *flags.split()]
    settings = parse(VaeSettings, [*words, "--adversarial-pretraining", str(pretraining)], "train-vae")
    stage = VaeStage(settings, read_sheet(sheet), accelerator(settings.precision))
    if stage.adversary:
        stage.adversary.state["began"] = began
        with torch.no_grad():
            stage.adversary.discriminator[-1].weight *= 10
    return stage


def gradients(stage, step=0):
    """Gradients of the autoencoder with its likelihood, and of the discriminator, by name; none of a step before."""
    stage.forget()
    figures = stage.backward(next(stage.batches(step)), step)
    model, discriminator = (
        {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        for module in (stage.model, stage.adversary.discriminator)
    )
    return model, discriminator, figures


def relative(found, expected):
    """Relative L2 distance of two sets of gradients."""
    assert found.keys() == expected.keys()
    difference, whole = (
        torch.cat([tensor.flatten().double() for tensor in tensors]).norm()
        for tensors in ([found[name] - expected[name] for name in expected], expected.values())
    )
    return (difference / whole).item()


# The classical step


def two_pass(stage, step=0, detached=False):
    """Gradients of two networks as Esser et al. 2021 train them: a walk for the generator, one for the critic.

    `detached` plants a fault: the generator's adversarial term does not see where its pictures come from.
    """
    settings = stage.settings
    model, critic = copy.deepcopy(stage.model), copy.deepcopy(stage.adversary.discriminator)
    batch, parts, weights = next(stage.batches(step)), settings.micro_batches, []
    for i in range(parts):
        x, _, eps = stage._inputs(batch.part(i, parts))
        critic.requires_grad_(False)
        out = model(x, eps)
        fidelity, price = fidelity_of(settings, model, out, x), price_of(settings, model, out, x, eps)
        adversarial = -critic(out.x_hat).mean()
        last = model.vae.decoder.conv_out.weight
        norms = [torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (fidelity, adversarial)]
        weights.append(min((norms[0] / (norms[1] + 1e-8)).item(), settings.adversarial_cap))
        if detached:
            adversarial = -critic(out.x_hat.detach()).mean()
        ((fidelity + price + settings.adversarial * weights[-1] * adversarial) / parts).backward()
        critic.requires_grad_(True)
        fake, real = critic(model(x, eps).x_hat.detach()), critic(x)
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        if settings.r1 and step % 16 == 0:
            loss = loss + 16 * settings.r1 / 2 * r1_by_hand(critic, x)
        (loss / parts).backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, critic)]
    return *grads, sum(weights) / parts


def fidelity_of(settings, model, out, x):
    """An error or nats a value, and a perceptual distance with gradients through both of its branches."""
    if settings.bound:
        scale, excess = out.log_scale.exp(), BIN**2 / 12  # E(x_hat - x - u)^2 = (x_hat - x)^2 + BIN^2 / 12
        nats = -Normal(out.x_hat, scale).log_prob(x) + excess / (2 * scale**2) - math.log(BIN)
        error = nats.mean()
    else:
        error = F.l1_loss(out.x_hat, x) if settings.perceptual == "features" else F.mse_loss(out.x_hat, x)
    if settings.perceptual == "none":
        return error
    maps = zip(*map(GradientFeatures().features, (out.x_hat, x)))
    return error + 3 * torch.stack([F.l1_loss(*pair) for pair in maps]).mean()


def price_of(settings, model, out, x, eps):
    """What is asked of the latents."""
    h = model.encode(x)
    if settings.regularizer == "vq":
        rows = h.permute(0, 2, 3, 1).flatten(0, 2)
        codes = model.vae.quantize.embedding.weight
        nearest = (rows[:, None] - codes).square().sum(2).argmin(1)
        return settings.commitment * F.mse_loss(rows, codes[nearest])
    mean, logvar = h.chunk(2, 1)
    std = (logvar / 2).exp() if settings.learn_variance or settings.bound else torch.full_like(mean, 0.1)
    beta = (1 if settings.beta is None else settings.beta) if settings.bound else 1e-3
    return beta * kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum() / x.numel()


def r1_by_hand(critic, x):
    """The mean over pictures, one after the other, of |d mean D / d x|^2."""
    total = 0.0
    for picture in x.split(1):
        leaf = picture.clone().requires_grad_()
        total = total + torch.autograd.grad(critic(leaf).mean(), leaf, create_graph=True)[0].square().sum()
    return total / len(x)


CASES = [
    "--regularizer kl --r1 0",
    "--regularizer kl --perceptual features",
    "--regularizer kl --perceptual features --micro-batches 2",
    "--regularizer kl --learn-variance --adversarial-cap 0.01",
    "--regularizer vq --codebook 16 --r1 0",
    "--regularizer vq --codebook 16 --perceptual features",
    "--regularizer vq --codebook 16 --perceptual features --micro-batches 2",
    "--beta 1",
    "--beta 1 --perceptual features",
    "--beta 1 --perceptual features --micro-batches 2",
]


@pytest.mark.parametrize("flags", CASES)
def test_one_pass_gives_the_gradients_of_two(sheet, flags):
    stage = stage_of(sheet, flags)
    model, critic, adaptive = two_pass(stage)
    ours, ours_critic, figures = gradients(stage)
    assert ("likelihood.log_scale" in ours) == ("--beta" in flags)
    assert relative(ours, model) <= 1e-4
    assert relative(ours_critic, critic) <= 1e-4
    assert figures["adaptive_weight"].item() == pytest.approx(adaptive, rel=1e-4)
    assert 0.2 < figures["discriminator_accuracy"] < 0.99  # both sides of the hinge are met


def test_bf16_gives_nearly_the_same(sheet):
    stage, low = stage_of(sheet, "--perceptual features"), stage_of(sheet, "--perceptual features --precision bf16")
    assert all(0 < relative(*pair) < 0.1 for pair in zip(gradients(low)[:2], gradients(stage)[:2]))


@pytest.mark.parametrize("network", [False, True])
def test_only_a_network_s_features_are_taken_in_bf16(sheet, network):
    """Fixed filters take differences of neighbours, of which bf16 would leave little; held-out figures are exact."""
    seen, stage = [], stage_of(sheet, "--perceptual features --precision bf16")

    class Watched(Lpips if network else GradientFeatures):
        def __init__(self):
            nn.Module.__init__(self)

        def features(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return GradientFeatures().features(x)

        distance = GradientFeatures.distance

    stage.perceptual = stage.held_out.perceptual = Watched()
    gradients(stage)
    assert seen == [network] * 2
    stage.validate()
    assert not any(seen[2:])


def test_the_penalty_comes_every_sixteenth_step(sheet):
    with_it, without = (stage_of(sheet, f"--r1 {r1}") for r1 in (10, 0))
    for step, same in ((15, True), (16, False)):
        found, plain = (gradients(stage, step)[1] for stage in (with_it, without))
        assert (relative(found, plain) < 1e-6) == same


def test_a_detached_reconstruction_is_seen(sheet):
    """What the comparison, and the pull below, would miss if they could not fail."""
    stage = stage_of(sheet, "--perceptual features")
    ours = gradients(stage)[0]
    assert relative(ours, two_pass(stage, detached=True)[0]) > 0.1
    assert min(pull(stage).values()) > 1e-3
    judge = stage.adversary._judge
    stage.adversary._judge = lambda x: judge(x.detach()) + 0 * x.sum()
    assert max(pull(stage).values()) < 1e-6


def pull(stage):
    """How much of each part's gradient comes from the discriminator."""
    weight, sums = stage.adversary.state["weight"], defaultdict(lambda: torch.zeros(2))
    with_it = gradients(stage)[0]
    stage.adversary.state["weight"] = 0.0
    without = gradients(stage)[0]
    stage.adversary.state["weight"] = weight
    for name, gradient in without.items():
        squares = [(with_it[name] - gradient).square().sum(), gradient.square().sum()]
        sums[name.split(".")[1]] += torch.stack(squares)
    assert sums.keys() == {"encoder", "quant_conv", "post_quant_conv", "decoder"}
    return {part: (total[0] / total[1]).sqrt().item() for part, total in sums.items()}


# Who learns when


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module, before):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


FLOW = ["--regularizer kl --perceptual features", "--regularizer vq --codebook 16", "--beta 1"]


@pytest.mark.parametrize("flags", FLOW)
def test_while_it_waits_nothing_is_different(sheet, flags):
    stage, without = stage_of(sheet, flags, began=None), stage_of(sheet, flags + " --adversarial 0")
    model, critic, figures = gradients(stage)
    plain = without.backward(next(without.batches(0)), 0)
    assert critic == {} and figures == plain
    assert all(torch.equal(model[n], p.grad) for n, p in without.model.named_parameters() if p.requires_grad)
    before = state_of(stage.adversary.discriminator)
    stage.step(next(stage.batches(0)), 0)
    assert changed(stage.adversary.discriminator, before) == set()


@pytest.mark.parametrize("flags", FLOW)
def test_only_the_discriminator_learns_before_the_decoder_sees_it(sheet, flags):
    stage = stage_of(sheet, flags, pretraining=2)
    model, critic, figures = gradients(stage)
    assert model == {} and "loss" not in figures
    assert len(critic) == len(list(stage.adversary.discriminator.parameters()))
    modules = stage.models | {"all": stage.model}
    before = {name: state_of(module) for name, module in modules.items()}
    stage.step(next(stage.batches(1)), 1)
    assert {name for name, module in modules.items() if changed(module, before[name])} == {"discriminator"}
    before = {name: state_of(module) for name, module in modules.items()}
    stage.step(next(stage.batches(2)), 2)
    assert all(changed(module, before[name]) for name, module in modules.items())


@pytest.mark.parametrize("flags", FLOW)
def test_then_both_learn(sheet, flags):
    stage = stage_of(sheet, flags)
    model, critic, figures = gradients(stage)
    trained = {name for name, p in stage.model.named_parameters() if p.requires_grad}
    assert set(model) == trained and all(gradient.isfinite().all() for gradient in model.values())
    assert all(critic[name].abs().max() > 0 for name, _ in stage.adversary.discriminator.named_parameters())
    assert {"loss", "adversarial", "adaptive_weight", "discriminator", "discriminator_accuracy"} <= set(figures)


def test_the_adaptive_weight_is_capped(sheet):
    free = gradients(stage_of(sheet, "--adversarial-cap 1e6"))[2]["adaptive_weight"].item()
    capped = gradients(stage_of(sheet, f"--adversarial-cap {free / 2}"))[2]["adaptive_weight"].item()
    assert capped == pytest.approx(free / 2)


# The discriminator


def test_hinge_is_the_formula():
    real, fake = torch.randn(2, 5, 1, 3, 4).unbind(0)
    naive = [
        max(0.0, 1 - r) / 2 + max(0.0, 1 + f) / 2 for r, f in zip(real.flatten().tolist(), fake.flatten().tolist())
    ]
    assert hinge(real, fake).item() == pytest.approx(sum(naive) / len(naive))


def test_the_penalty_of_a_linear_discriminator():
    linear = nn.Linear(12, 3)  # three patches
    critic = nn.Sequential(nn.Flatten(), linear)
    penalty = gradient_penalty(critic, torch.randn(5, 3, 2, 2))
    w = linear.weight.detach().mean(0)
    assert_close(penalty, w.square().sum())
    penalty.backward()
    assert_close(linear.weight.grad, (2 * w / 3).expand(3, 12))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "size, patches", [((12, 12), (4, 4)), ((16, 16), (6, 6)), ((32, 32), (6, 6)), ((64, 48), (14, 10))]
)
def test_patches(channels, size, patches):
    critic = PatchDiscriminator(channels, 16, depth_for(size))
    assert critic(torch.zeros(2, channels, *size)).shape == (2, 1, *patches)
    assert not any(isinstance(module, nn.modules.batchnorm._NormBase) for module in critic.modules())


@pytest.mark.parametrize("width", range(4, 17))
def test_any_width_that_an_autoencoder_may_have(width):
    assert PatchDiscriminator(1, 2 * width, 3)(torch.zeros(1, 1, 64, 64)).isfinite().all()
