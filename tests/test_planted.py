"""Collapses planted in real runs of 200 steps: each is said, and nothing is said of runs that are well."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from calotype import checkpoint, cli, loop
from calotype.device import accelerator
from calotype.disk import sha256
from calotype.latents import read_index
from calotype.sheet import read_sheet
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.regularizers import VectorQuantization
from calotype.stage1_vae.train import VaeStage
from calotype.stage2_diffusion.train import DiffusionStage

pytestmark = pytest.mark.reliability

STEPS = 200
SHORT = f"--width 8 --batch-size 8 --precision fp32 --steps {STEPS}".split()
UNET = ["--width", "16", *SHORT[2:], "--kid-samples", "0", "--sampler-steps", "2"]


def train_vae(finished, out, *more):
    return cli.main(["train-vae", str(finished / "data.json"), *SHORT, "--factor", "2", *more, "--out", str(out)])


def train_unet(finished, out, *more, latents=None):
    source = ["--latents", str(latents or finished / "latents"), "--vae", str(finished / "stage1_vae/vae")]
    return cli.main(["train-diffusion", *source, *UNET, *more, "--out", str(out)])


def said(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["said"] for line in lines if "said" in line and line["step"] <= STEPS]


def column(out, name):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


# Collapses


def test_a_heavy_beta(finished, tmp_path):
    assert train_vae(finished, tmp_path / "run", "--beta", "100") == 0
    assert any(sentence.startswith("Posterior collapse") for sentence in said(tmp_path / "run"))


def test_dead_codes(finished, tmp_path, monkeypatch):
    @torch.no_grad()
    def far_away(quantizer, h, generator):
        quantizer.embedding.weight[1:] = 1000.0
        quantizer.average.restart(quantizer.embedding.weight)

    monkeypatch.setattr(VectorQuantization, "start_from", far_away)
    monkeypatch.setattr(VectorQuantization, "revive_below", -1.0)
    assert train_vae(finished, tmp_path / "run", "--regularizer", "vq", "--codebook", "16") == 0
    assert any(sentence.startswith("Dead codes") for sentence in said(tmp_path / "run"))


WINS = "--perceptual features --adversarial 0.5 --adversarial-start 0.3 --adversarial-pretraining 60".split()
WINS += "--discriminator-lr 2e-2 --r1 0 --validations 10".split()


def test_a_perfect_discriminator_is_told_and_costs_a_decibel_at_most(finished, tmp_path):
    out = tmp_path / "run"
    assert train_vae(finished, out, *WINS) == 0
    assert any(sentence.startswith("The discriminator wins") for sentence in said(out))
    assert max(column(out, "discriminator_accuracy[train]")) > 0.99
    weights = column(out, "adaptive_weight[train]")
    assert weights and all(0 <= weight <= 100 for weight in weights)
    before = checkpoint.load(out / "checkpoints")[1]["stage"]["adversary"]["before"]["psnr"]
    assert json.loads((out / "finished.json").read_text())["psnr[val]"] >= before - 1


@pytest.mark.parametrize("std", [40.0, 0.02, math.nan])
def test_latents_of_a_strange_scale(finished, tmp_path, capsys, std):
    latents = scaled(finished / "latents", tmp_path / "latents", std)
    assert train_unet(finished, tmp_path / "run", latents=latents) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--latents {latents}" in line
    found = re.search(r"standard deviation of the latents is ([\d.]+) .* --init VAE --steps 0", line)
    assert ("not finite" in line) if math.isnan(std) else float(found[1]) == pytest.approx(std, rel=0.2)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def scaled(cache, latents, factor):
    """A copy of a latent cache, sound in every byte, whose latents are so many times as wide."""
    latents.mkdir()
    index = read_index(cache)
    for name in index.sha256:
        tensors = load_file(cache / name)
        wide = {key: value * factor for key, value in tensors.items() if key in ("mean", "std")}
        save_file(tensors | wide, latents / name)
    index._replace(sha256={name: sha256(latents / name) for name in index.sha256}).write(latents)
    return latents


def test_a_learning_rate_that_jumps(finished, tmp_path, monkeypatch):
    factor = loop.learning_rate_factor
    monkeypatch.setattr(
        loop, "learning_rate_factor", lambda s, step, p: factor(s, step, p) * (100 if step > 150 else 1)
    )
    assert train_vae(finished, tmp_path / "run") == 0
    assert any(sentence.startswith("The loss jumped at step 15") for sentence in said(tmp_path / "run"))


def test_a_unet_that_never_learns(finished, tmp_path):
    assert train_unet(finished, tmp_path / "run", "--lr", "1e-8") == 0
    assert any(sentence.startswith("The network has learnt hardly anything") for sentence in said(tmp_path / "run"))


def test_a_storm_of_nan_ends_in_one_line(finished, tmp_path, monkeypatch, capsys):
    break_steps(monkeypatch, VaeStage, lambda stage: stage.model.vae.decoder.conv_out, range(20, STEPS))
    assert train_vae(finished, tmp_path / "run", "--checkpoint-every", "10") == 2
    assert "again and again" in capsys.readouterr().err
    assert any("three times in a row" in sentence for sentence in said(tmp_path / "run"))


def break_steps(monkeypatch, stage_class, module_of, steps):
    """A module's output is NaN at these steps."""
    backward = stage_class.backward

    def broken(stage, batch, step):
        if step not in steps:
            return backward(stage, batch, step)
        with module_of(stage).register_forward_hook(lambda _module, _inputs, output: output * math.nan):
            return backward(stage, batch, step)

    monkeypatch.setattr(stage_class, "backward", broken)


# Nothing is said of what is well

WELL = {
    "kl": [],
    "vq": ["--regularizer", "vq", "--codebook", "64"],
    "gan": "--perceptual features --adversarial 0.5 --adversarial-pretraining 20".split(),
    "bound": ["--beta", "1"],
}


@pytest.mark.parametrize("name", WELL)
def test_no_alarm_on_an_autoencoder_that_is_well(finished, tmp_path, name, sized):
    assert train_vae(finished, tmp_path / "run", *WELL[name], "--steps", str(sized(120, 600))) == 0
    about_the_adversary = ("adversarial", "The guard steps in")  # it goes to and fro as it is meant to
    assert [
        sentence for sentence in said(tmp_path / "run") if not any(p in sentence for p in about_the_adversary)
    ] == []


@pytest.mark.parametrize("objective", ["flow", "v", "epsilon", "x0"])
def test_no_alarm_on_a_unet_that_is_well(finished, tmp_path, objective, sized):
    steps = str(sized(100, 600))
    if objective in sized(("v", "epsilon"), ()):
        pytest.skip("with --nightly")
    assert train_unet(finished, tmp_path / "run", "--objective", objective, "--steps", steps, "--lr", "2e-3") == 0
    assert said(tmp_path / "run") == []


# Twenty steps that are not finite


@pytest.mark.parametrize("stage", ["train-vae", "train-diffusion"])
def test_twenty_nans_are_left_out_counted_and_told(finished, tmp_path, monkeypatch, stage):
    out, bad = tmp_path / "run", set(range(3, 83, 4))
    untouched = []
    if stage == "train-vae":
        break_steps(monkeypatch, VaeStage, lambda found: found.model.vae.encoder.conv_in, bad)
        watch_averages(monkeypatch, VaeStage, bad, untouched)
        assert train_vae(finished, out, "--steps", "90", "--log-every", "1") == 0
    else:
        break_steps(monkeypatch, DiffusionStage, lambda found: found.net.unet.conv_in, bad)
        watch_averages(monkeypatch, DiffusionStage, bad, untouched)
        assert train_unet(finished, out, "--steps", "90", "--log-every", "1") == 0
    assert len(bad) == 20 and untouched == [True] * 20
    assert json.loads((out / "finished.json").read_text())["skipped"] == 20
    assert sum(column(out, "skipped")) == 20 == sum("the step was left out" in sentence for sentence in said(out))
    parts, _ = checkpoint.load(out / "checkpoints")
    assert all(t.isfinite().all() for part in parts.values() for t in part.values() if t.is_floating_point())


def watch_averages(monkeypatch, stage_class, bad, untouched):
    """Note for each bad step whether every weight and every average is bit for bit as before it."""
    step = stage_class.step

    def bits(stage):
        modules = [*stage.models.values(), *(average.model for average in stage.averages.values())]
        return [value.clone() for module in modules for value in module.state_dict().values()]

    def watched(stage, batch, number):
        before = bits(stage) if number in bad else []
        figures = step(stage, batch, number)
        if number in bad:
            untouched.append(all(map(torch.equal, before, bits(stage))))
        return figures

    monkeypatch.setattr(stage_class, "step", watched)


# Recovery of a codebook


def test_a_codebook_of_which_all_but_one_are_killed_is_in_use_again_after_300_steps(tmp_path):
    given = dict(source="", out="", width=8, factor=2, batch_size=8, precision="fp32", regularizer="vq", codebook=32)
    assert cli.main(["data", "shapes", "--image-size", "16", "--out", str(tmp_path)]) == 0
    stage = VaeStage(VaeSettings(**given), read_sheet(tmp_path / "data.json"), accelerator("fp32"))
    batches = stage.batches(0)

    @torch.no_grad()
    def usage():
        h = stage.encode(stage.take(stage.pictures, list(range(256))))
        return len(stage.model.regularizer.indices(h).unique()) / 32

    for step in range(60):
        stage.step(next(batches), step)
    assert usage() >= 0.9
    with torch.no_grad():
        quantizer = stage.model.regularizer
        quantizer.embedding.weight[1:] = 1000.0
        quantizer.average.restart(quantizer.embedding.weight)
    assert usage() == pytest.approx(1 / 32)
    for step in range(60, 360):
        stage.step(next(batches), step)
    assert usage() >= 0.9


# What the guard costs


def test_the_guard_costs_one_per_cent_at_most(finished, sized):
    """CPU time of everything that it adds to a step, by itself, against the CPU time of a step by default settings."""
    from benchmarks.guard_cost import cost

    figures = cost(finished, rounds=sized(10, 60))
    print(figures)
    assert figures["share"] <= 0.01, figures
