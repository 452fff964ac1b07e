"""Objectives against diffusers' own noising, closed forms of their weights, and the exact denoiser of a Gaussian."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel, UniPCMultistepScheduler
from torch.testing import assert_close

from calotype.stage2_diffusion.conditioning import drop_labels
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.denoiser import Denoiser, Given, Prediction, Uncertainty
from calotype.stage2_diffusion.objectives import Objective, logit_normal, mode, weight_of

MEAN, STD = 0.5, 0.3
NAMES = ("flow", "v", "epsilon", "x0")
ALL = [(name, False) for name in NAMES] + [("v", True), ("x0", True)]  # True: zero terminal SNR
STOCK = {"v": "v_prediction", "epsilon": "epsilon", "x0": "sample"}


def objective(name="flow", zero=False, **more):
    return Objective(DiffusionSettings(out="", latents="", objective=name, zero_terminal_snr=zero, **more))


class Recorder(torch.nn.Module):
    """A network that remembers what it was asked and answers with zeros."""

    log_variance = None

    def forward(self, z, t, given):
        self.z, self.t, self.given = z, t, given
        return Prediction(torch.zeros_like(z), self.log_variance)


def example(n=64, shape=(2, 3, 3)):
    g = torch.Generator().manual_seed(0)
    z, eps = torch.randn(n, *shape, generator=g), torch.randn(n, *shape, generator=g)
    return z, eps, torch.rand(n, generator=g)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", STOCK)
def test_diffusion_noises_and_aims_as_ddpm_of_diffusers(name, zero):
    if (name, zero) == ("epsilon", True):
        pytest.skip("refused, see below")
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    stock = DDPMScheduler(**betas, prediction_type=STOCK[name], rescale_betas_zero_snr=zero)
    z, eps, u = example()
    net = Recorder()
    loss = objective(name, zero)(net, z, None, eps, u)
    # diffusers' solver keeps the very last signal at 2^-24 in place of 0, to be able to divide by it
    assert_close(net.z, stock.add_noise(z, eps, net.t), atol=1e-3 if zero else 1e-6, rtol=1e-5)
    target = {"epsilon": eps, "x0": z, "v": stock.get_velocity(z, eps, net.t)}[name]
    assert_close(loss, target.square().mean((1, 2, 3)), atol=1e-3 if zero else 1e-6, rtol=1e-4)
    assert net.t.min() >= 0 and net.t.max() <= 999 and net.t.unique().numel() > 50


def test_with_zero_terminal_snr_the_last_latents_are_noise():
    z, eps, _ = example(2)
    for zero, signal in ((True, 1e-3), (False, 0.05)):
        net = Recorder()
        objective("v", zero)(net, 100 * z, None, eps, torch.full((2,), 0.9999))
        assert ((net.z - eps).abs().max() < signal * 100) == zero
    with pytest.raises(ValueError, match="--zero-terminal-snr.*--objective v"):
        objective("epsilon", True)


def test_flow_noises_as_flow_matching_of_diffusers():
    z, eps, u = example()
    net = Recorder()
    loss = objective()(net, z, None, eps, u)
    stock = FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(sigmas=[0.25, 0.5], num_inference_steps=2)
    s = torch.tensor([0.25, 0.5]).repeat(32)
    expected = (1 - s[:, None, None, None]) * z + s[:, None, None, None] * eps
    assert_close(stock.scale_noise(z, 1000 * s, eps), expected)
    share = (net.t / 1000)[:, None, None, None]
    assert_close(net.z, (1 - share) * z + share * eps)
    assert_close(loss, (eps - z).square().mean((1, 2, 3)))


def grid(n=20_000):
    return (torch.arange(n) + 0.5) / n


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-1.2, 1.2)])
def test_logit_normal_times(mean, std):
    logit = torch.logit(logit_normal(grid(), mean, std).double())
    assert_close(logit.mean().item(), mean, atol=1e-3, rtol=0)
    assert_close(logit.std().item(), std, atol=1e-2, rtol=0)
    net = Recorder()
    objective(time_mean=mean, time_std=std)(
        net, torch.zeros(20_000, 1, 1, 1), None, torch.zeros(20_000, 1, 1, 1), grid()
    )
    assert_close(net.t / 1000, logit_normal(grid(), mean, std))


def test_mode_times_have_the_density_of_the_paper():
    """p(s) = |df^-1/ds| for f(u) = 1 - u - a (cos^2(pi u / 2) - 1 + u): shares of times against quadrature."""
    s = mode(grid(100_000)).double()
    assert s.min() >= 0 and s.max() <= 1
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    f = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    for low, high in ((0.0, 0.1), (0.4, 0.6), (0.9, 1.0)):
        share = ((f >= low) & (f <= high)).double().mean()
        assert_close(((s >= low) & (s <= high)).double().mean(), share, atol=1e-3, rtol=0)
    assert (s - 0.5).abs().lt(0.1).double().mean() > 0.25  # more than the 0.2 of uniform times


@pytest.mark.parametrize("density", ["uniform", "logit-normal", "mode"])
@pytest.mark.parametrize("name", NAMES)
def test_any_density_goes_with_any_objective(name, density):
    z, eps, u = example()
    net = Recorder()
    objective(name, density=density)(net, z, None, eps, u)
    expected = {"uniform": u, "logit-normal": logit_normal(u), "mode": mode(u)}[density] * 1000
    assert_close(net.t.float(), expected if name == "flow" else expected.floor().clamp_max(999))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_what_the_papers_ask_of_each_parametrisation(name):
    """min-SNR: table of Hang et al. 2023, section 3.4; EDM: weight and c_out of table 1, for data of unit variance."""
    s = torch.linspace(0.02, 0.98, 50)
    _, alpha, sigma = objective(name).path.at(s)
    snr = (alpha / sigma) ** 2
    capped = snr.clamp_max(5)
    min_snr = {"epsilon": capped / snr, "v": capped / (snr + 1), "x0": capped, "flow": capped * s**2}[name]
    assert_close(weight_of("min-snr", name, alpha, sigma), min_snr)
    noise = sigma / alpha  # EDM's sigma
    of_x0 = (noise**2 + 1) / noise**2
    edm = {"epsilon": of_x0 * noise**2, "v": torch.ones(50), "x0": of_x0, "flow": s**2 + (1 - s) ** 2}[name]
    assert_close(weight_of("edm", name, alpha, sigma), edm, atol=1e-4, rtol=1e-4)
    assert_close(weight_of("none", name, alpha, sigma), torch.ones(50))


@pytest.mark.parametrize("weighting", ["none", "min-snr", "edm"])
def test_the_loss_is_weight_times_error(weighting):
    z, eps, u = example()
    net = Recorder()
    weighted = objective("v", weighting=weighting)
    loss = weighted(net, z, None, eps, u)
    _, alpha, sigma = weighted.path.at(u)
    assert_close(loss, weight_of(weighting, "v", alpha, sigma) * weighted.errors(net, z, None, eps, u))


def test_learned_uncertainty_is_least_at_the_log_of_the_error():
    z, eps, u = example(4000)
    net = Recorder()
    learnt = objective("flow", weighting="uncertainty")
    errors = learnt.errors(net, z, None, eps, u)
    best = errors.mean().log()
    losses = {}
    for shift in (-0.3, 0.0, 0.3):
        net.log_variance = (best + shift).expand(4000)
        losses[shift] = learnt(net, z, None, eps, u).mean().item()
    assert losses[0.0] < min(losses[-0.3], losses[0.3])
    assert losses[0.0] == pytest.approx(1 + best.item(), rel=1e-4)


def test_the_uncertainty_learns_an_error_that_depends_on_the_time():
    head = Uncertainty(seed=0)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    t = 1000 * grid(512)
    error = 0.1 + (t / 1000) ** 2
    for _ in range(300):
        w = head(t)
        loss = (error / w.exp() + w).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(head(t).exp(), error, atol=0.05, rtol=0.1)


class ExactDenoiser(torch.nn.Module):
    """The best possible network for pixels that are N(MEAN, STD^2), whatever is predicted."""

    def __init__(self, name, zero=False):
        super().__init__()
        self.name, self.path = name, objective(name, zero).path

    def forward(self, z, t, given=None):
        t = torch.as_tensor(t).reshape(-1)
        if self.name == "flow":
            alpha, sigma = 1 - t / 1000, t / 1000
        else:
            alpha_bar = self.path.alphas_cumprod[t.long().clamp(0, 999)]
            alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
        variance = (alpha * STD) ** 2 + sigma**2
        x0 = MEAN + alpha * STD**2 / variance * (z - alpha * MEAN)
        eps = sigma / variance * (z - alpha * MEAN)
        return Prediction({"flow": eps - x0, "epsilon": eps, "v": alpha * eps - sigma * x0, "x0": x0}[self.name])


@pytest.mark.parametrize("name, zero", ALL)
def test_the_exported_sampler_draws_the_exact_gaussian(name, zero):
    """15 steps with the exact denoiser: the deviation within 3 %, and the mean."""
    scheduler = objective(name, zero).scheduler()
    assert isinstance(scheduler, UniPCMultistepScheduler)
    scheduler = UniPCMultistepScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(15)
    z = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    model = ExactDenoiser(name, zero)
    for t in scheduler.timesteps:
        z = scheduler.step(model(z, t).value, t, z).prev_sample
    assert abs(z.mean().item() - MEAN) < 0.02
    assert abs(z.std().item() / STD - 1) < 0.03


@pytest.mark.parametrize("name, zero", ALL)
def test_no_network_beats_the_exact_one(name, zero):
    g = torch.Generator().manual_seed(1)
    z = MEAN + STD * torch.randn(4000, 1, 2, 2, generator=g)
    eps, u = torch.randn(4000, 1, 2, 2, generator=g), torch.rand(4000, generator=g)
    loss, exact = objective(name, zero), ExactDenoiser(name, zero)
    best = loss(exact, z, None, eps, u).mean()

    for scale, shift in ((0.9, 0.0), (1.1, 0.0), (1.0, 0.1), (1.0, -0.1)):

        def other(z, t, given, scale=scale, shift=shift):
            return Prediction(scale * exact(z, t).value + shift)

        assert loss(other, z, None, eps, u).mean() > best


def unet(classes=4):
    return UNet2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        num_class_embeds=classes + 1,
        add_attention=False,
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_reaches_every_parameter(name):
    net = Denoiser(unet(), uncertainty=Uncertainty(seed=0))
    z, eps, u = example(8, (2, 4, 4))
    objective(name, weighting="uncertainty")(net, z, Given(torch.arange(8) % 5), eps, u).mean().backward()
    still = [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert still == []


@pytest.mark.parametrize("fault", ["detach", "no_grad"])
def test_a_planted_fault_is_seen(fault):
    """What the test above would miss if it could not fail."""
    model = unet()
    inner = model.conv_in.forward

    def broken(x):
        if fault == "detach":
            return inner(x).detach()
        with torch.no_grad():
            return inner(x)

    model.conv_in.forward = broken
    z, eps, u = example(8, (2, 4, 4))
    objective()(Denoiser(model), z, Given(torch.arange(8) % 5), eps, u).mean().backward()
    assert model.conv_in.weight.grad is None


def test_only_the_labels_seen_are_learnt():
    model = unet()
    z, eps, u = example(2, (2, 4, 4))
    objective()(Denoiser(model), z, Given(torch.tensor([1, 4])), eps, u).mean().backward()
    rows = model.class_embedding.weight.grad.abs().amax(1) > 0
    assert rows.tolist() == [False, True, False, False, True]


def test_labels_are_dropped_at_the_wished_rate_and_by_position():
    y = torch.arange(20_000) % 4
    dropped = drop_labels(y, 4, 0.1, seed=0, start=0)
    share = (dropped == 4).float().mean().item()
    assert abs(share - 0.1) < 0.01
    assert torch.equal(dropped[dropped != 4], y[dropped != 4])
    assert torch.equal(dropped[100:200], drop_labels(y[100:200], 4, 0.1, seed=0, start=100))
    assert drop_labels(torch.tensor([-1, 2]), 4, 0.0, seed=0, start=0).tolist() == [4, 2]
