import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch.testing import assert_close

from calotype.stage2_diffusion.conditioning import drop_labels
from calotype.stage2_diffusion.objectives import OBJECTIVES, Diffusion, FlowMatching

MEAN, STD = 0.5, 0.3


class Recorder(torch.nn.Module):
    """A network that remembers what it was asked and answers with zeros."""

    def forward(self, z, t, class_labels=None):
        self.z, self.t, self.y = z, t, class_labels
        return type("Output", (), {"sample": torch.zeros_like(z)})()


def example(n=64):
    g = torch.Generator().manual_seed(0)
    z, eps = torch.randn(n, 2, 3, 3, generator=g), torch.randn(n, 2, 3, 3, generator=g)
    return z, eps, torch.rand(n, generator=g)


@pytest.mark.parametrize("prediction, name", [("epsilon", "epsilon"), ("v", "v_prediction")])
def test_diffusion_noises_and_aims_as_ddpm_of_diffusers(prediction, name):
    stock = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=name)
    z, eps, u = example()
    unet = Recorder()
    loss = Diffusion(prediction)(unet, z, None, eps, u)
    assert_close(unet.z, stock.add_noise(z, eps, unet.t))
    target = eps if prediction == "epsilon" else stock.get_velocity(z, eps, unet.t)
    assert_close(loss, target.square().mean((1, 2, 3)))
    assert unet.t.min() >= 0 and unet.t.max() <= 999 and unet.t.unique().numel() > 50


def test_flow_noises_as_flow_matching_of_diffusers():
    z, eps, u = example()
    unet = Recorder()
    loss = FlowMatching()(unet, z, None, eps, u)
    stock = FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(sigmas=[0.25, 0.5], num_inference_steps=2)
    s = torch.tensor([0.25, 0.5]).repeat(32)
    assert_close(
        stock.scale_noise(z, 1000 * s, eps),
        (1 - s[:, None, None, None]) * z + s[:, None, None, None] * eps,
    )
    weight = (unet.t / 1000)[:, None, None, None]
    assert_close(unet.z, (1 - weight) * z + weight * eps)
    assert_close(loss, (eps - z).square().mean((1, 2, 3)))


def test_flow_times_are_logit_normal():
    unet, n = Recorder(), 20_000
    u = (torch.arange(n) + 0.5) / n
    FlowMatching()(unet, torch.zeros(n, 1, 1, 1), None, torch.zeros(n, 1, 1, 1), u)
    logit = torch.logit(unet.t / 1000)
    assert_close(logit.mean(), torch.tensor(0.0), atol=1e-3, rtol=0)
    assert_close(logit.std(), torch.tensor(1.0), atol=1e-2, rtol=0)


class ExactDenoiser(torch.nn.Module):
    """The best possible network for pixels that are N(MEAN, STD^2), whatever is predicted."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.alphas_cumprod = None if name == "flow" else Diffusion(name).alphas_cumprod

    def forward(self, z, t, class_labels=None):
        t = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1)
        if self.name == "flow":
            alpha, sigma = 1 - t / 1000, t / 1000
        else:
            alpha_bar = self.alphas_cumprod[t.long().clamp(0, 999)]
            alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        variance = (alpha * STD) ** 2 + sigma**2
        x0 = MEAN + alpha * STD**2 / variance * (z - alpha * MEAN)
        eps = sigma / variance * (z - alpha * MEAN)
        answer = {"flow": eps - x0, "epsilon": eps, "v": alpha * eps - sigma * x0}[self.name]
        return type("Output", (), {"sample": answer})()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_exported_sampler_draws_the_exact_gaussian(name):
    """18 steps with the exact denoiser: the deviation within 2 %, the mean within what the noisiest step knows."""
    scheduler = OBJECTIVES[name]().scheduler()
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(18)
    z = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    model = ExactDenoiser(name)
    for t in scheduler.timesteps:
        z = scheduler.step(model(z, t).sample, t, z).prev_sample
    assert abs(z.mean().item() - MEAN) < 0.02
    assert abs(z.std().item() / STD - 1) < 0.02


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_network_beats_the_exact_one(name):
    g = torch.Generator().manual_seed(1)
    z = MEAN + STD * torch.randn(4000, 1, 2, 2, generator=g)
    eps, u = torch.randn(4000, 1, 2, 2, generator=g), torch.rand(4000, generator=g)
    objective, exact = OBJECTIVES[name](), ExactDenoiser(name)
    best = objective(exact, z, None, eps, u).mean()

    for scale, shift in ((0.9, 0.0), (1.1, 0.0), (1.0, 0.1), (1.0, -0.1)):

        def other(z, t, class_labels=None, scale=scale, shift=shift):
            return type("Output", (), {"sample": scale * exact(z, t).sample + shift})()

        assert objective(other, z, None, eps, u).mean() > best


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


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_reaches_every_parameter_of_the_unet(name):
    model = unet()
    z, eps, u = (x[:8] for x in example())
    z, eps = torch.nn.functional.pad(z, (0, 1, 0, 1)), torch.nn.functional.pad(eps, (0, 1, 0, 1))
    y = torch.arange(8) % 5
    OBJECTIVES[name]()(model, z, y, eps, u).mean().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
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
    z, eps, u = (x[:8] for x in example())
    z, eps = torch.nn.functional.pad(z, (0, 1, 0, 1)), torch.nn.functional.pad(eps, (0, 1, 0, 1))
    FlowMatching()(model, z, torch.arange(8) % 5, eps, u).mean().backward()
    assert model.conv_in.weight.grad is None


def test_only_the_labels_seen_are_learnt():
    model = unet()
    z, eps, u = (x[:2] for x in example())
    z, eps = torch.nn.functional.pad(z, (0, 1, 0, 1)), torch.nn.functional.pad(eps, (0, 1, 0, 1))
    FlowMatching()(model, z, torch.tensor([1, 4]), eps, u).mean().backward()
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
