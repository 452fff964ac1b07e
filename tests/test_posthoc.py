"""Averages made afterwards against averages that were tracked all along, and the algebra against quadrature."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from calotype import cli
from calotype.ema import PowerEma
from calotype.posthoc import Profile, average, combine, inner_product, load_average, write_snapshot


def profile(p, tau):
    return np.where(tau <= p.step, (p.gamma + 1) * tau**p.gamma / p.step ** (p.gamma + 1), 0)


@pytest.mark.parametrize("a, b", [((10, 16.97), (10, 6.94)), ((4, 16.97), (10, 6.94)), ((9, 1.5), (6, 30.0))])
def test_inner_products_are_integrals(a, b):
    tau = np.linspace(0, 10, 400_001)
    expected = np.trapezoid(profile(Profile(*a), tau) * profile(Profile(*b), tau), tau)
    assert inner_product(Profile(*a), Profile(*b)) == pytest.approx(expected, rel=1e-3)


def test_a_known_average_is_found_among_the_known():
    known = [Profile(step, gamma) for step in (100, 200, 300) for gamma in (16.97, 6.94)]
    assert combine(known, known[3]) == pytest.approx([0, 0, 0, 1, 0, 0], abs=1e-5)


def walk(steps, every, folder, widths=(0.05, 0.1), other=0.15):
    """Weights on a noisy path; snapshots of two averages, and a third one tracked all along."""
    model = nn.Linear(40, 1)
    tracks = [{"unet": PowerEma(model, width)} for width in widths]
    wanted = PowerEma(model, other)
    g = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        with torch.no_grad():
            drift = torch.linspace(0, 2, 40) * (step / steps) ** 0.5
            model.weight.copy_(drift + 0.1 * torch.randn(1, 40, generator=g))
            model.bias.fill_(step / steps)
        for ema in (*(track["unet"] for track in tracks), wanted):
            ema.update(model, step)
        if step % every == 0:
            write_snapshot(folder, step, tracks)
    return model, wanted


@pytest.mark.parametrize("other, tolerance", [(0.15, 0.01), (0.08, 0.004), (0.2, 0.015)])
def test_a_width_that_nobody_tracked_is_close_to_one_that_was(tmp_path, other, tolerance):
    model, wanted = walk(800, 50, tmp_path, other=other)
    found = average(tmp_path, other, ["unet"])["unet"]
    last, truth = model.weight.detach(), wanted.model.weight
    assert (found["weight"] - truth).square().mean().sqrt() < tolerance
    assert (last - truth).square().mean().sqrt() > 5 * tolerance  # the last weights are much further off
    assert found["bias"] == pytest.approx(wanted.model.bias.item(), abs=0.01)


def test_an_earlier_average_uses_earlier_snapshots_alone(tmp_path):
    _, early = walk(400, 50, tmp_path / "a")
    walk(800, 50, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():  # the same path, half as fast, would end elsewhere
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    found = average(tmp_path / "b", 0.15, ["unet"], until=400)["unet"]
    assert (found["weight"] - early.model.weight).abs().max() < 0.05


def test_whole_numbers_stay_as_they_are():
    module = nn.BatchNorm1d(2)
    module.num_batches_tracked += 3
    load_average(module, {name: torch.full_like(value, 0.5).float() for name, value in module.state_dict().items()})
    assert module.num_batches_tracked == 3 and (module.running_mean == 0.5).all()


def test_the_command_replaces_the_weights_or_makes_an_earlier_model(finished, tmp_path, capsys):
    latents = ["--latents", str(finished / "latents"), "--vae", str(finished / "stage1_vae/vae")]
    short = "--width 16 --steps 20 --batch-size 8 --precision fp32 --validations 4 --sampler-steps 2".split()
    run = tmp_path / "s2"
    assert cli.main(["train-diffusion", *latents, *short, "--out", str(run)]) == 0
    weights = run / "unet/diffusion_pytorch_model.safetensors"
    before = load_file(weights)
    assert cli.main(["posthoc-ema", str(run), "--width", "0.05"]) == 0
    same = load_file(weights)
    assert all(torch.allclose(before[name], same[name], atol=2e-3, rtol=1e-2) for name in before)
    assert cli.main(["posthoc-ema", str(run), "--width", "0.2"]) == 0
    assert json.loads((run / "model.json").read_text())["ema_width"] == 0.2
    wide = load_file(weights)
    early = tmp_path / "early"
    assert cli.main(["posthoc-ema", str(run), "--width", "0.2", "--until", "10", "--out", str(early)]) == 0
    earlier = load_file(early / "unet/diffusion_pytorch_model.safetensors")
    name = "conv_in.weight"
    assert (wide[name] - before[name]).abs().max() > 1e-4 < (wide[name] - earlier[name]).abs().max()
    assert (early / "scheduler/scheduler_config.json").is_file()
    assert cli.main(["posthoc-ema", str(run), "--width", "0.1", "--until", "10"]) == 2
    assert "--until 10" in capsys.readouterr().err
    assert cli.main(["posthoc-ema", str(tmp_path), "--width", "0.1"]) == 2
    assert f"RUN {tmp_path} holds no finished" in capsys.readouterr().err
