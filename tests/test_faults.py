"""Steps whose gradient is not finite: what they leave alone, what is said, and how a run goes on or ends."""

import json

import pytest
import torch
from torch import nn

from calotype import checkpoint, cli, loop, updates
from calotype.device import accelerator
from calotype.sheet import read_sheet
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.train import VaeStage
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.train import DiffusionStage

NAN = float("nan")
TINY = "--width 8 --factor 2 --batch-size 8 --precision fp32 --validations 1 --log-every 1 --warmup-steps 0".split()
TINY += ["--lr-schedule", "constant"]


def words(finished, out, *more):
    return ["train-vae", str(finished / "data.json"), *TINY, "--steps", "8", "--out", str(out), *more]


def vae_stage(finished, **more):
    given = dict(source="", out="", width=8, factor=2, batch_size=8, precision="fp32")
    given |= {"vq": {"codebook": 16}, "fsq": {"levels": "5,4"}}.get(more.get("regularizer"), {}) | more
    return VaeStage(VaeSettings(**given), read_sheet(finished / "data.json"), accelerator("fp32"))


def diffusion_stage(finished, **more):
    given = dict(out="", latents=finished / "latents", width=16, batch_size=8, precision="fp32") | more
    return DiffusionStage(DiffusionSettings(**given), finished / "stage1_vae/vae", accelerator("fp32"))


def break_forward(monkeypatch, module_of, steps, stage_class=VaeStage):
    """A module's output is NaN at these steps, whoever walks through them."""
    backward = stage_class.backward

    def broken(stage, batch, step):
        with monkeypatch.context() as patch:
            if step in steps:
                module = module_of(stage)
                forward = module.forward
                patch.setattr(module, "forward", lambda *inputs, **more: forward(*inputs, **more) * NAN)
            return backward(stage, batch, step)

    monkeypatch.setattr(stage_class, "backward", broken)


def break_backward(monkeypatch, module_of, steps, stage_class=VaeStage):
    """The gradient at a module's output is NaN at these steps; the forward pass is sound."""
    backward = stage_class.backward

    def broken(stage, batch, step):
        def spoil(_module, _inputs, output):
            output.register_hook(lambda gradient: gradient * NAN)

        if step not in steps:
            return backward(stage, batch, step)
        with module_of(stage).register_forward_hook(spoil):
            return backward(stage, batch, step)

    monkeypatch.setattr(stage_class, "backward", broken)


def middle_of_encoder(stage):
    return stage.model.vae.encoder.mid_block.resnets[0].conv1


def middle_of_decoder(stage):
    return stage.model.vae.decoder.mid_block.resnets[0].conv1


def everything(stage):
    """All that is learnt or averaged, and the state of the optimisers; copies."""
    parts = {name: module.state_dict() for name, module in stage.models.items()}
    parts |= {f"{name} average": average.state_dict() for name, average in stage.averages.items()}
    parts |= {f"{name} optimizer": checkpoint.optimizer_tensors(o) for name, o in stage.optimizers.items()}
    return {f"{part}/{name}": tensor.clone() for part, tensors in parts.items() for name, tensor in tensors.items()}


def differing(before, after):
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def take(stage, *steps):
    return [stage.step(next(stage.batches(step)), step) for step in steps][-1]


# One step

KINDS = [
    {"regularizer": "kl"},
    {"regularizer": "kl", "optimizer": "sgd", "micro_batches": 2},
    {"beta": 1.0, "likelihood": "laplace"},
    {"regularizer": "vq"},
    {"regularizer": "vq", "micro_batches": 2},
    {"regularizer": "fsq"},
    {"regularizer": "tc"},
]


@pytest.mark.parametrize("more", KINDS, ids=str)
@pytest.mark.parametrize("module_of", [middle_of_encoder, middle_of_decoder])
def test_a_step_that_is_not_finite_changes_no_bit(finished, monkeypatch, more, module_of):
    stage = vae_stage(finished, **more)
    break_forward(monkeypatch, module_of, {2})
    take(stage, 0, 1)
    before = everything(stage)
    assert not take(stage, 2)["gradient_norm"].isfinite()
    changed = differing(before, everything(stage))
    if module_of is middle_of_decoder:  # the codes were sound, so that their critic may learn
        changed = [name for name in changed if not name.startswith("critic")]
    assert changed == []
    assert take(stage, 3)["gradient_norm"].isfinite()
    assert any(name.startswith("vae/") for name in differing(before, everything(stage)))


@pytest.mark.parametrize("broken", [break_forward, break_backward])
def test_a_unet_is_left_alone_too(finished, monkeypatch, broken):
    stage = diffusion_stage(finished)
    broken(monkeypatch, lambda stage: stage.net.unet.conv_in, {2}, DiffusionStage)
    take(stage, 0, 1)
    before = everything(stage)
    assert not take(stage, 2)["gradient_norm"].isfinite()
    assert differing(before, everything(stage)) == []
    take(stage, 3)
    assert "unet/conv_in.weight" in differing(before, everything(stage))


@pytest.mark.parametrize("kind", ["sgd", "fused", "plain"])  # AdamW is not fused on MPS
def test_an_update_leaves_an_optimizer_as_it_is(kind, monkeypatch):
    if kind == "plain":
        monkeypatch.setattr(updates, "best_device", lambda: torch.device("mps"))
    one = accelerator("fp32")
    law = {"optimizer": "sgd"} if kind == "sgd" else {"weight_decay": 0.1}
    settings = VaeSettings(source="", out="", **law)

    def model_after(factors):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = loop.make_optimizer(model, settings, 0.1)
        for i, factor in enumerate(factors):
            (factor * model(torch.full((3, 4), i % 2 + 1.0))).square().mean().backward()
            norm = loop.update(one, model, optimizer, clip=1.0)
            assert norm.isfinite() == (factor == 1)
        return {**model.state_dict(), **checkpoint.optimizer_tensors(optimizer)}

    sound = model_after([1, 1])
    assert kind == "sgd" or {"0.exp_avg", "0.exp_avg_sq", "0.step"} <= set(sound)
    for factor in (NAN, float("inf")):
        assert differing(sound, model_after([1, 1, factor, factor])) == []
        assert differing(model_after([1, 1, 1]), model_after([1, 1, factor, factor, 1])) == []


# A run


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def said(out):
    return {line["step"]: line["said"] for line in lines(out) if "said" in line}


def column(out, name):
    return {line["step"]: line[name] for line in lines(out) if name in line}


FORWARD = [
    (middle_of_encoder, "vae.encoder.mid_block.resnets.0.conv1"),
    (middle_of_decoder, "vae.decoder.mid_block.resnets.0.conv1"),
    (lambda stage: stage.model.vae.decoder, "vae.decoder"),
]


@pytest.mark.parametrize("module_of, name", FORWARD)
def test_the_module_is_named_and_the_run_goes_on(finished, tmp_path, monkeypatch, capsys, module_of, name):
    break_forward(monkeypatch, module_of, {3})
    assert cli.main(words(finished, tmp_path / "run")) == 0
    sentence = f"NaN or Inf at step 3 first came out of {name} (examples 24 to 31); the step was left out."
    assert said(tmp_path / "run") == {4: sentence}
    assert sentence in capsys.readouterr().out
    assert sorted(column(tmp_path / "run", "loss[train]")) == [1, 2, 3, 5, 6, 7, 8]
    assert set(column(tmp_path / "run", "lr").values()) == {0.004}
    assert (tmp_path / "run/vae/config.json").is_file()


def test_a_step_is_named_by_its_number_within_a_longer_window(finished, tmp_path, monkeypatch):
    break_forward(monkeypatch, middle_of_encoder, {5})
    assert cli.main(words(finished, tmp_path / "run", "--log-every", "4")) == 0
    assert said(tmp_path / "run")[8].startswith("NaN or Inf at step 5 first came out of vae.encoder.mid_block.")


def test_a_fault_of_the_backward_pass_is_named_and_the_run_goes_on(finished, tmp_path, monkeypatch):
    break_backward(monkeypatch, lambda stage: stage.model.vae.decoder.conv_out, {3})
    assert cli.main(words(finished, tmp_path / "run")) == 0
    (sentence,) = said(tmp_path / "run").values()
    assert sentence.startswith("NaN or Inf at step 3 came up in the backward pass, in the gradient of vae.decoder.conv")


def test_steps_that_are_not_in_a_row_are_named_one_by_one(finished, tmp_path, monkeypatch):
    break_forward(monkeypatch, middle_of_encoder, {0, 2, 4, 6, 7})
    assert cli.main(words(finished, tmp_path / "run")) == 0  # there is no checkpoint to go back to
    steps = [sentence.split()[5] for sentence in said(tmp_path / "run").values()]
    assert steps == ["0", "2", "4", "6"]
    assert set(column(tmp_path / "run", "lr").values()) == {0.004}


def test_a_fault_of_stage_2_is_named_and_the_run_goes_on(finished, tmp_path, monkeypatch):
    break_forward(monkeypatch, lambda stage: stage.net.unet.mid_block.resnets[0].conv1, {3}, DiffusionStage)
    source = ["--latents", str(finished / "latents"), "--vae", str(finished / "stage1_vae/vae"), "--width", "16"]
    more = ["--steps", "6", "--sampler-steps", "2", "--batch-size", "8", "--precision", "fp32", "--log-every", "1"]
    assert cli.main(["train-diffusion", *source, *more, "--validations", "1", "--out", str(tmp_path / "run")]) == 0
    (sentence,) = said(tmp_path / "run").values()
    assert sentence.startswith("NaN or Inf at step 3 first came out of unet.mid_block.resnets.0.conv1 (examples 24")
    assert sorted(column(tmp_path / "run", "loss[train]")) == [1, 2, 3, 5, 6]


def test_figures_leave_out_the_steps_that_were_left_out(finished, tmp_path, monkeypatch):
    break_forward(monkeypatch, middle_of_encoder, {1, 2, 6})
    assert cli.main(words(finished, tmp_path / "each")) == 0
    assert cli.main(words(finished, tmp_path / "four", "--log-every", "4")) == 0
    each, four = (column(tmp_path / name, "loss[train]") for name in ("each", "four"))
    assert sorted(each) == [1, 4, 5, 6, 8] and sorted(four) == [4, 8]
    assert four[4] == pytest.approx((each[1] + each[4]) / 2, rel=1e-6)
    assert four[8] == pytest.approx((each[5] + each[6] + each[8]) / 3, rel=1e-6)


@pytest.mark.parametrize("log_every", ["1", "2", "8"])
def test_three_in_a_row_send_the_run_back_with_half_the_rate(finished, tmp_path, monkeypatch, log_every):
    break_forward(monkeypatch, middle_of_encoder, {5, 6, 7})
    out = tmp_path / "run"
    more = ["--checkpoint-every", "4", "--keep-checkpoints", "9", "--steps", "16", "--log-every", log_every]
    assert cli.main(words(finished, out, *more)) == 0
    assert "goes back to the weights of step 4" in said_all(out)[1] and "half the learning rate" in said_all(out)[1]
    first, back, last = (read_checkpoint(out, step) for step in (4, 8, 16))
    assert differing(first, back) == [] and differing(back, last) != []  # not step 4's own successor: that was undone
    rates = column(out, "lr")
    assert {rate for step, rate in rates.items() if step > 8} == {0.002}
    assert {rate for step, rate in rates.items() if step <= 8} == {0.004}
    assert json.loads((out / "finished.json").read_text())["steps"] == 16


def said_all(out):
    return [line["said"] for line in lines(out) if "said" in line]


def read_checkpoint(out, step):
    parts, state = checkpoint.load(out / "checkpoints", up_to=step)
    assert state["step"] == step
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


@pytest.mark.parametrize("first_fault, expected", [(0, "there is no checkpoint to go back to"), (3, "again and again")])
def test_a_run_that_cannot_go_on_ends_in_one_line(finished, tmp_path, monkeypatch, capsys, first_fault, expected):
    break_forward(monkeypatch, middle_of_encoder, range(first_fault, 1000))
    out = tmp_path / "run"
    assert cli.main(words(finished, out, "--steps", "1000", "--checkpoint-every", "3", "--keep-checkpoints", "9")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line and "--lr" in line and "--precision fp32" in line
    assert not (out / "finished.json").exists() and not (out / "vae").exists()
    if first_fault:
        assert sum("half the learning rate" in sentence for sentence in said_all(out)) == 4
        assert differing(read_checkpoint(out, 3), newest(out)) == []


def newest(out):
    return read_checkpoint(out, int(checkpoint.steps(out / "checkpoints")[-1].name[-8:]))
