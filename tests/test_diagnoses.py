"""What ails an autoencoder: each fault is planted, and found once; its sentence names a way out that exists."""

import json
import os
import re
import signal

import pytest
import torch

from calotype import checkpoint, cli
from calotype.complaints import flag
from calotype.device import accelerator
from calotype.sheet import read_sheet
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.diagnoses import Diagnoses
from calotype.stage1_vae.regularizers import VectorQuantization
from calotype.stage1_vae.train import VaeStage
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.diagnoses import Diagnoses as UnetDiagnoses
from calotype.stage2_diffusion.train import DiffusionStage

WELL = {"psnr": 24.0, "psnr[train]": 24.5, "active_units": 1.0, "latent_std": 1.0, "code_usage": 0.9}
WELL |= {"perplexity": 300.0, "discriminator_accuracy": 0.7}
FAULTS = {
    "Posterior collapse": {"active_units": 0.04},
    "Dead codes": {"code_usage": 0.4, "perplexity": 17.0},
    "The discriminator wins": {"discriminator_accuracy": 0.97},
    "The latents are far from unit variance": {"latent_std": 0.05},
    "The latents are far from unit variance: their standard deviation is 20": {"latent_std": 20.0},
    "Over-fitting": {"psnr": 23.5, "psnr[train]": 26.0},
}


def said(*validations, progress=0.5):
    """What is said about figures that are as well as can be but for these, validation by validation."""
    diagnoses = Diagnoses()
    return [diagnoses.of(WELL | faults, progress) for faults in ({}, *validations)][1:]


# The rules


@pytest.mark.parametrize("name", FAULTS)
def test_a_sentence_is_one_line_with_a_way_out_that_exists(name):
    ((sentence,),) = said(FAULTS[name])
    assert sentence.startswith(name) and sentence.endswith(".")
    assert "\n" not in sentence and "  " not in sentence
    flags = re.findall(r"--[a-z0-9-]+", sentence)
    assert flags and set(flags) <= {flag(field) for field in VaeSettings.model_fields}


@pytest.mark.parametrize("name", FAULTS)
def test_it_is_said_once_and_again_after_it_went_away(name):
    fault = FAULTS[name]
    spoken = [len(sentences) for sentences in said(fault, fault, {}, {}, fault, fault)]
    assert spoken == [1, 0, 0, 0, 1, 0]


EDGES = {
    "Posterior collapse": [{"active_units": 0.05}],
    "Dead codes": [{"code_usage": 0.5}],
    "The discriminator wins": [{"discriminator_accuracy": 0.95}],
    "The latents": [{"latent_std": 0.1}, {"latent_std": 10.0}],
    "Over-fitting": [
        {"psnr": 23.9, "psnr[train]": 30.0},  # not falling
        {"psnr": 23.0, "psnr[train]": 24.4},  # falling, seen pictures with it
    ],
}


@pytest.mark.parametrize("name", EDGES)
def test_nothing_is_said_up_to_the_edge(name):
    assert [said(figures) for figures in EDGES[name]] == [[()]] * len(EDGES[name])


def test_a_young_run_is_left_in_peace():
    everything = {name: value for fault in FAULTS.values() for name, value in fault.items()}
    assert said(everything, progress=0.19) == [()]
    assert len(said(everything, progress=0.2)[0]) == 5


def test_two_faults_at_a_time_are_two_sentences():
    first, second = said(FAULTS["Posterior collapse"], FAULTS["Posterior collapse"] | FAULTS["Over-fitting"])
    assert first[0].startswith("Posterior collapse") and len(first) == 1
    assert second[0].startswith("Over-fitting") and len(second) == 1


def test_over_fitting_is_a_fall_from_the_best_and_not_from_the_last():
    falling = [{"psnr": 24.0 - 0.15 * i, "psnr[train]": 26.0} for i in range(4)]
    assert [len(sentences) for sentences in said(*falling)] == [0, 0, 1, 0]


def test_what_was_said_goes_through_json():
    diagnoses, fault = Diagnoses(), WELL | FAULTS["Dead codes"]
    diagnoses.of(WELL, 0.4), diagnoses.of(fault, 0.5)
    resumed = Diagnoses()
    resumed.state.update(json.loads(json.dumps(diagnoses.state)))
    assert resumed.of(fault, 0.6) == ()
    assert len(resumed.of(WELL | FAULTS["Over-fitting"], 0.7)) == 1  # the best so far is remembered
    assert len(resumed.of(fault, 0.8)) == 1


# The faults themselves, planted in an autoencoder that is measured


def stage(finished, **more):
    given = dict(source="", out="", width=8, factor=2, batch_size=8, precision="fp32") | more
    given |= {} if "regularizer" in more else {"learn_variance": True}
    found = VaeStage(VaeSettings(**given), read_sheet(finished / "data.json"), accelerator("fp32"))
    with torch.no_grad():  # a fresh encoder's latents are narrow; these have unit variance
        if found.settings.regularizer == "kl":
            found.model.vae.quant_conv.weight /= found.validate()["latent_std"]
    return found


def diagnosed(found):
    return [sentence.partition(":")[0] for sentence in found.review(found.validate(), 10, 0.5).sentences]


@torch.no_grad()
def test_an_encoder_that_does_not_look_is_a_collapse(finished):
    found = stage(finished)
    assert diagnosed(found) == []
    found.model.vae.quant_conv.weight[:] = 0
    assert diagnosed(found) == ["Posterior collapse", "The latents are far from unit variance"]


@torch.no_grad()
@pytest.mark.parametrize("factor, way", [(0.05, "--posterior-std"), (20.0, "raise --beta")])
def test_latents_that_are_too_narrow_or_too_wide(finished, factor, way):
    found = stage(finished)
    found.model.vae.quant_conv.weight *= factor
    sentences = found.review(found.validate(), 10, 0.5).sentences
    std = re.search(r"standard deviation is ([\d.]+)", sentences[-1])
    assert float(std[1]) == pytest.approx(factor, rel=0.01) and way in sentences[-1]


@torch.no_grad()
def test_codes_that_lie_far_away_are_dead(finished):
    found = stage(finished, regularizer="vq", codebook=16)
    assert diagnosed(found) == []
    found.model.regularizer.embedding.weight[1:] = 1000.0
    figures = found.validate()
    assert figures["code_usage"] == pytest.approx(1 / 16) and figures["perplexity"] == pytest.approx(1.0)
    assert diagnosed(found) == ["Dead codes"]


def test_a_discriminator_that_was_trained_alone_wins(finished):
    """It is said once the decoder sees it, and not while it is meant to win."""
    found = stage(finished, adversarial=0.5, discriminator_lr=4e-3)
    assert "The discriminator wins" not in diagnosed(found)
    figures = found.validate()
    found.adversary.state |= {"began": 0, "before": figures, "good": figures}
    with torch.no_grad():
        x = found.take(found.pictures, list(range(32)))
        x_hat = found.decode(torch.zeros(32, 4, 8, 8), (16, 16))
    for step in range(40):
        found.adversary.pretrain(x_hat, x, step, 1)
        found.adversary.update()
    assert diagnosed(found) == []
    found.adversary.state["began"] = -found.settings.adversarial_pretraining
    assert diagnosed(found) == ["The discriminator wins"]


# A diffusion model


def of_unets(*losses, step=100, progress=0.5):
    diagnoses = UnetDiagnoses(lambda: 2.0)
    return [diagnoses.of({"loss": loss}, step, progress) for loss in losses]


def test_a_network_that_is_hardly_better_than_zero_is_told_once():
    (first,), second, well, (again,) = of_unets(1.9, 1.85, 1.0, 5.0)
    assert second == well == () and "1.9" in first and "answering zero makes 2" in first
    assert "--lr" in first and again.startswith("The network has learnt hardly anything")
    assert of_unets(1.79) == [()] == of_unets(1.99, step=49) == of_unets(1.99, progress=0.19)
    assert len(of_unets(float("nan"))[0]) == 1


def test_a_held_out_error_that_rises_is_over_fitting():
    quiet, told, same, quiet_again = of_unets(1.0, 1.11, 1.2, 1.0)
    assert (quiet, same, quiet_again) == ((), (), ()) and of_unets(1.0, 1.09) == [(), ()]
    assert told[0].startswith("Over-fitting: the held-out error is 1.11, 11% above its best of 1;")
    flags = set(re.findall(r"--[a-z0-9-]+", told[0]))
    assert flags == {"--flip", "--width"} <= {flag(field) for field in (*VaeSettings.model_fields,)}


def test_the_error_of_zero_is_the_mean_square_of_what_is_predicted(finished):
    """Of the latents themselves for x0; of the noise for epsilon, which is 1 but for chance."""
    given = dict(out="", latents=finished / "latents", width=16, batch_size=8, precision="fp32")

    def found(objective):
        settings = DiffusionSettings(**given, objective=objective)
        return DiffusionStage(settings, finished / "stage1_vae/vae", accelerator("fp32"))

    clean = found("x0")
    z = clean._held_out_batch(list(range(len(clean.held_out))), 0).x
    assert clean.error_of_zero == pytest.approx(z.square().mean().item(), rel=1e-5)
    assert found("epsilon").error_of_zero == pytest.approx(1, rel=0.1)
    assert found("flow").error_of_zero == pytest.approx(1 + clean.error_of_zero, rel=0.1)


# Runs

SHORT = "--width 8 --batch-size 8 --precision fp32 --validations 4".split()
ONE_CODE = "--latent-dim 2 --steps 60 --lr 0.002".split()


def train(finished, out, *more):
    return cli.main(["train-vae", str(finished / "data.json"), *SHORT, *more, "--out", str(out)])


def journal(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["said"] for line in lines if "said" in line]


def test_a_heavy_beta_collapses_the_posterior_and_a_resumed_run_does_not_repeat_it(finished, tmp_path, monkeypatch):
    words, step = [*ONE_CODE, "--beta", "1000"], VaeStage.step

    def interrupted(found, batch, number):
        if number == 50:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(found, batch, number)

    monkeypatch.setattr(VaeStage, "step", interrupted)
    with pytest.raises(SystemExit):
        train(finished, tmp_path / "run", *words)
    before = [sentence for sentence in journal(tmp_path / "run") if "Posterior collapse" in sentence]
    assert len(before) == 1
    monkeypatch.setattr(VaeStage, "step", step)
    assert train(finished, tmp_path / "run", *words, "--resume") == 0
    assert [sentence for sentence in journal(tmp_path / "run") if "Posterior collapse" in sentence] == before
    assert json.loads((tmp_path / "run/finished.json").read_text())["active_units[val]"] == 0  # and still it holds


def test_a_light_beta_does_not(finished, tmp_path):
    assert train(finished, tmp_path / "run", *ONE_CODE, "--beta", "0.01") == 0
    assert not any("Posterior collapse" in sentence for sentence in journal(tmp_path / "run"))


@pytest.mark.parametrize("fault", [False, True])
def test_a_codebook_that_begins_far_away_and_is_not_revived_is_dead(finished, tmp_path, monkeypatch, fault):
    def far_away(quantizer, h, generator):
        quantizer.embedding.weight[1:] = 1000.0
        quantizer.average.restart(quantizer.embedding.weight)

    if fault:
        monkeypatch.setattr(VectorQuantization, "start_from", torch.no_grad()(far_away))
        monkeypatch.setattr(VectorQuantization, "revive_below", -1.0)
    words = ["--factor", "2", "--regularizer", "vq", "--codebook", "16", "--steps", "8"]
    assert train(finished, tmp_path / "run", *words) == 0
    dead = [sentence for sentence in journal(tmp_path / "run") if sentence.startswith("Dead codes")]
    assert len(dead) == fault
    state = checkpoint.load(tmp_path / "run/checkpoints")[1]
    assert ("dead codes" in state["stage"]["diagnoses"]["active"]) == fault
