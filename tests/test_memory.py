"""What is done where memory is short: smaller parts, the same step; activations computed twice."""

import pytest
import torch
from torch.testing import assert_close

from calotype import cli
from calotype.device import accelerator
from calotype.errors import UserError
from calotype.memory import backward_that_fits, ran_out
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.train import DiffusionStage


def stage(finished, **more):
    settings = DiffusionSettings(
        out="", latents=finished / "latents", width=16, batch_size=8, precision="fp32", no_snapshots=True, **more
    )
    return DiffusionStage(settings, finished / "stage1_vae/vae", accelerator("fp32"))


def short_of_memory(there, most):
    """A network that finds room for so many examples and no more."""
    forward = there.net.unet.forward

    def limited(x, *args, **more):
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(x, *args, **more)

    there.net.unet.forward = limited


def test_a_step_that_does_not_fit_is_taken_in_parts_to_the_same_bits(finished, capsys):
    there, small = stage(finished), stage(finished, micro_batches=4)
    short_of_memory(there, 2)
    for step in range(2):
        found = there.step(next(there.batches(step)), step)
        expected = small.step(next(small.batches(step)), step)
        assert torch.equal(found["loss"], expected["loss"])
    for a, b in zip(there.net.parameters(), small.net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert there.state["memory"] == {"parts": 4}
    assert capsys.readouterr().out.count("memory ran out") == 2  # 8 to 4 to 2 examples, then no more


def test_a_single_example_that_does_not_fit_is_said(finished):
    there = stage(finished)
    short_of_memory(there, 0)
    with pytest.raises(UserError, match="--micro-batches 8"):
        there.step(next(there.batches(0)), 0)


def test_other_faults_are_not_taken_for_a_lack_of_memory(finished):
    there = stage(finished)
    there.net.unet.forward = lambda *args, **more: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):
        backward_that_fits(there, next(there.batches(0)), 0)


def test_the_allocator_of_the_cpu_is_understood():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert ran_out(caught.value)


def test_a_run_remembers_what_fitted(finished, tmp_path, monkeypatch):
    build = DiffusionStage.__init__

    def limited(self, *args):
        build(self, *args)
        short_of_memory(self, 4)

    monkeypatch.setattr(DiffusionStage, "__init__", limited)
    words = ["train-diffusion", "--latents", str(finished / "latents"), "--vae", str(finished / "stage1_vae/vae")]
    words += "--width 16 --batch-size 8 --precision fp32 --steps 3 --sampler-steps 2 --validations 1".split()
    words += ["--kid-samples", "0", "--out", str(tmp_path / "s2")]
    monkeypatch.setattr(DiffusionStage, "preview", lambda self: __import__("PIL.Image").Image.new("L", (1, 1)))
    monkeypatch.setattr(DiffusionStage, "validate", lambda self: {"loss": 0.0})
    assert cli.main(words) == 0
    from calotype import checkpoint

    assert checkpoint.load(tmp_path / "s2/checkpoints")[1]["stage"]["memory"] == {"parts": 2}


def test_checkpointed_activations_give_the_same_gradient(finished):
    plain, frugal = stage(finished), stage(finished, gradient_checkpointing=True)
    assert frugal.net.unet.is_gradient_checkpointing and not plain.net.unet.is_gradient_checkpointing
    for there in (plain, frugal):
        for parameter in there.net.parameters():  # the last layers begin at 0 and would let nothing through
            parameter.data += 0.01
        there.backward(next(there.batches(0)), 0)
    for a, b in zip(plain.net.parameters(), frugal.net.parameters(), strict=True):
        assert_close(a.grad, b.grad)
