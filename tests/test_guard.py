"""The guard of the adversarial phase: its rules, and a run in which it has to step in."""

import json
import math
import os
import signal

import pytest
import torch

from calotype import checkpoint, cli
from calotype.autoencoder import load_autoencoder
from calotype.device import accelerator
from calotype.stage1_vae.adversary import Adversary
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.train import VaeStage

# The rules


def adversary(**more):
    settings = VaeSettings(source="", out="", adversarial=0.5, width=4, **more)
    return Adversary(settings, 1, (16, 16), accelerator("fp32"))


def say(critic, psnr, perceptual=0.1, step=1000, progress=0.9):
    return critic.review({"psnr": psnr, "perceptual": perceptual, "other": 1.0}, step, progress)


def playing(**more):
    """Begun at 30 dB and a distance of 0.1, and past its pretraining."""
    critic = adversary(adversarial_start="0", adversarial_pretraining=10, **more)
    assert say(critic, 30.0, step=100).good
    return critic


def test_it_begins_at_a_share_and_then_the_discriminator_is_alone():
    critic = adversary(adversarial_start="0.4", adversarial_pretraining=50)
    assert say(critic, 20.0, step=99, progress=0.39) == ((), False, False) and critic.phase(99) == "waiting"
    review = say(critic, 21.0, step=100, progress=0.4)
    assert review.good and not review.go_back and "begins at 21.00 dB" in review.sentences[0]
    assert [critic.phase(step) for step in (100, 149, 150)] == ["pretraining", "pretraining", "playing"]
    assert say(critic, math.nan, step=149) == ((), False, False)


def test_it_begins_at_a_plateau():
    critic = adversary(adversarial_start="plateau")
    assert [say(critic, psnr).good for psnr in (20.0, 22.0, 24.0, 24.05, 24.06)] == [False] * 4 + [True]
    critic = adversary(adversarial_start="plateau")
    assert not any(say(critic, psnr).good for psnr in (20.0, 22.0, 24.0, 24.2, 24.0))  # the better of two counts
    critic = adversary(adversarial_start="plateau")
    assert not any(say(critic, 20 + 0.06 * i).good for i in range(20))  # 0.12 dB in two validations is a gain


@pytest.mark.parametrize(
    "psnr, perceptual, goes_back",
    [
        (28.4, 0.05, True),  # 1.6 dB are too much, however much sharper
        (28.6, 0.09, False),
        (28.6, 0.1005, False),  # half a per cent is noise
        (28.6, 0.12, True),
        (29.95, 0.12, False),  # 0.05 dB are noise
        (31.0, 0.12, False),
        (math.nan, 0.05, True),
        (math.nan, math.nan, True),
    ],
)
def test_what_the_guard_accepts(psnr, perceptual, goes_back):
    critic = playing()
    review = say(critic, psnr, perceptual)
    assert (review.go_back, review.good) == (goes_back, not goes_back)
    assert critic.state["weight"] == (0.25 if goes_back else 0.5)
    assert critic.state["good"]["psnr"] == (30.0 if goes_back else psnr)
    assert bool(review.sentences) == goes_back and all("halved to 0.25" in said for said in review.sentences)


def test_small_falls_do_not_add_up_and_the_drop_is_a_setting():
    critic = playing()
    assert [say(critic, psnr, p).go_back for psnr, p in ((29.0, 0.09), (28.6, 0.08), (28.4, 0.07))] == [0, 0, 1]
    assert critic.state["good"] == {"psnr": 28.6, "perceptual": 0.08}
    assert not say(playing(max_psnr_drop=3.0), 27.1, 0.05).go_back


def test_a_discriminator_that_goes_back_to_the_start_learns_alone_again():
    critic = playing()
    assert say(critic, 10.0, step=200).go_back
    assert [critic.phase(step) for step in (200, 209, 210)] == ["pretraining", "pretraining", "playing"]
    assert say(critic, 30.0, 0.09, step=300).good and say(critic, 10.0, step=400).go_back
    assert critic.phase(400) == "playing" and critic.state["weight"] == 0.125


def test_the_state_is_json():
    critic, other = playing(), adversary(adversarial_start="0", adversarial_pretraining=10)
    other.state.update(json.loads(json.dumps(critic.state)))
    assert say(other, 28.0) == say(critic, 28.0) and other.state == critic.state


# A harmful discriminator, from end to end


MODEL = "--width 8 --factor 2 --latent-channels 2 --batch-size 8 --precision fp32".split()
GUARDED = "--perceptual features --adversarial 0.5 --adversarial-start 0.2 --adversarial-pretraining 2".split()
LENGTH = "--validations 5 --steps 20 --log-every 1 --checkpoint-every 5 --keep-checkpoints 1".split()
RATE = "--warmup-steps 0 --lr 3e-2 --lr-schedule constant".split()


def command(sheet, out, *more):
    return ["train-vae", str(sheet), *MODEL, *GUARDED, *LENGTH, *RATE, "--out", str(out), *more]


def plant(patch):
    """An adversarial gradient so loud that nothing else is heard."""
    weigh = Adversary.adaptive_weight
    patch.setattr(Adversary, "adaptive_weight", lambda *inputs: 1e5 * weigh(*inputs))


@pytest.fixture(scope="module")
def sheet(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("sheet")
    assert cli.main(["data", str(pictures), "--image-size", "16", "--out", str(out)]) == 0
    return out / "data.json"


@pytest.fixture(scope="module")
def guarded(sheet, tmp_path_factory):
    """A run of 20 steps that a harmful discriminator spoils."""
    out = tmp_path_factory.mktemp("guarded") / "run"
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        assert cli.main(command(sheet, out)) == 0
    return out


def newest(out, up_to=None):
    return checkpoint.load(out / "checkpoints", up_to)


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_harmful_discriminator_is_undone(guarded):
    """Steps 4 and 5 are the discriminator's alone; at step 8 the damage shows."""
    (parts, state), (good, begun) = newest(guarded), newest(guarded, 4)
    assert (state["step"], begun["step"], state["good_step"]) == (20, 4, 4)
    assert parts.keys() == good.keys()
    for name in ("vae", "discriminator", "vae_optimizer", "discriminator_optimizer"):
        assert parts[name].keys() == good[name].keys()
        assert all(torch.equal(tensor, good[name][key]) for key, tensor in parts[name].items()), name
    exported = load_autoencoder(guarded / "vae", "--vae").state_dict()
    outside = [name for name in exported if not name.startswith(("quant_conv", "post_quant_conv"))]
    assert outside and all(torch.equal(exported[name], good["vae"][name]) for name in outside)


def test_it_is_said_and_the_weight_is_halved(guarded):
    said = [(line["step"], line["said"]) for line in lines_of(guarded) if "said" in line]
    falls = [step for step, text in said if "PSNR fell" in text and "the adversarial weight is halved to" in text]
    back = [step for step, text in said if "the run goes back to the weights of step 4" in text]
    assert falls == back and falls[0] == 8 and falls[-1] == 20
    weight = newest(guarded)[1]["stage"]["adversary"]["weight"]
    assert weight == 0.5 / 2 ** len(falls)
    assert f"halved to {0.25:.3g}" in next(text for step, text in said if step == 8 and "halved" in text)


def test_the_end_is_as_good_as_the_beginning(guarded):
    found = [line["psnr[val]"] for line in lines_of(guarded) if "psnr[val]" in line and line["step"] in (4, 20)]
    before = newest(guarded)[1]["stage"]["adversary"]["before"]["psnr"]
    assert found[0] == before and found[1] < before - 1.5  # there was something to undo
    final = json.loads((guarded / "finished.json").read_text())["psnr[val]"]
    assert final >= before - 1.5 and final == found[2]


def test_the_good_checkpoint_outlives_the_newer_ones(guarded):
    assert [folder.name for folder in checkpoint.steps(guarded / "checkpoints")] == ["step-00000004", "step-00000020"]
    assert all(checkpoint.verify(folder) is None for folder in checkpoint.steps(guarded / "checkpoints"))


def test_stopped_and_resumed_it_goes_the_same_way(guarded, sheet, tmp_path, monkeypatch, capsys):
    plant(monkeypatch)
    step = VaeStage.step

    def signalled(stage, batch, number):
        if number == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(stage, batch, number)

    monkeypatch.setattr(VaeStage, "step", signalled)
    with pytest.raises(SystemExit):
        cli.main(command(sheet, tmp_path))
    monkeypatch.setattr(VaeStage, "step", step)
    assert newest(tmp_path)[1]["stage"]["adversary"]["weight"] == 0.25
    assert cli.main(command(sheet, tmp_path, "--resume")) == 0
    printed = capsys.readouterr().out
    assert all(line["said"] in printed for line in lines_of(tmp_path) if "said" in line)
    timeless = [
        [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines_of(out)]
        for out in (tmp_path, guarded)
    ]
    assert timeless[0] == timeless[1]


def test_a_harmless_discriminator_is_left_alone(sheet, tmp_path):
    assert cli.main(command(sheet, tmp_path, "--lr", "1e-3")) == 0
    (_, state), said = newest(tmp_path), [line["said"] for line in lines_of(tmp_path) if "said" in line]
    assert state["good_step"] == 20 and state["stage"]["adversary"]["weight"] == 0.5
    assert not any("goes back to the weights" in text for text in said)
