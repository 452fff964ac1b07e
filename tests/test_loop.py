import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from calotype import checkpoint, cli, loop, pace
from calotype.data import Batch, micro_batches, share_of
from calotype.device import accelerator
from calotype.errors import UserError
from calotype.stage1_vae.config import VaeSettings


def settings(**more):
    return VaeSettings(**{"source": "", "out": "", "steps": 100, "warmup_steps": 9} | more)


def test_schedule_warms_up_and_comes_down():
    cosine, constant = settings(), settings(lr_schedule="constant")
    factors = [loop.learning_rate_factor(cosine, step, step / 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1, abs=1e-6) and max(factors) > 0.97 and factors[-1] < 0.001
    assert factors[50] == pytest.approx(0.5) and all(a > b for a, b in zip(factors[12:], factors[13:]))
    assert [loop.learning_rate_factor(constant, s, s / 100) for s in (4, 9, 99)] == pytest.approx([0.5, 1, 1])


def test_pace_by_steps_by_clock_and_by_both(monkeypatch):
    one = SimpleNamespace(num_processes=1)
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    clock = loop.Pace(settings(steps=None, max_minutes=1.0), 0, 20.0, one)
    both = loop.Pace(settings(steps=10, max_minutes=1.0), 0, 20.0, one)
    now[0] = 10.0
    assert clock.progress(10**6) == pytest.approx(0.5)  # 20 s of an earlier session and 10 s of this one
    assert both.progress(9) == pytest.approx(0.9) and both.progress(2) == pytest.approx(0.5)
    now[0] = 99.0
    assert clock.progress(3) == 1.0
    assert loop.Pace(settings(steps=0), 0, 0.0, one).progress(0) == 1.0


def test_length_comes_from_the_flag_the_clock_or_the_preset():
    assert settings(steps=7).length == 7
    assert settings(steps=None, max_minutes=1.0).length is None
    assert settings(steps=None, preset="small").length == VaeSettings.LENGTHS["small"]


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_the_gradient_of_the_whole(parts):
    model, one = nn.Linear(6, 3), accelerator("fp32")
    batch = Batch(torch.randn(8, 6), torch.zeros(8), 40)
    model(batch.x).square().mean().backward()
    whole = model.weight.grad.clone()
    model.zero_grad()
    starts = []
    for part in micro_batches(one, model, batch, parts):
        starts.append(part.start)
        (model(part.x).square().mean() / parts).backward()
    torch.testing.assert_close(model.weight.grad, whole)
    assert starts == [40 + i * 8 // parts for i in range(parts)]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="--batch-size 10 must be a multiple of 1 processes x 4 micro-batches; try 8"):
        share_of(accelerator("fp32"), 10, 4)


def test_update_clips_steps_and_clears():
    model, one = nn.Linear(4, 1, bias=False), accelerator("fp32")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    (model(torch.full((1, 4), 100.0)) * 3).sum().backward()
    norm = loop.update(one, model, optimizer, clip=0.5)
    assert norm == pytest.approx(600.0)
    assert (model.weight - before).norm().item() == pytest.approx(0.5, rel=1e-4)
    assert model.weight.grad is None


def flags(finished, out, *more):
    model = "--width 8 --factor 2 --batch-size 8 --precision fp32 --validations 2 --steps 12 --log-every 1".split()
    return ["train-vae", str(finished / "data.json"), *model, "--out", str(out), *more]


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss[train]"] for line in lines if "loss[train]" in line}


def weights(out):
    return checkpoint.weights_hash(out / "vae")


def test_stopped_by_a_signal_and_repeated_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
    assert cli.main(flags(finished, tmp_path / "whole")) == 0
    from calotype.stage1_vae.train import VaeStage

    step = VaeStage.step

    def signalled(stage, batch, number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(stage, batch, number)

    monkeypatch.setattr(VaeStage, "step", signalled)
    with pytest.raises(SystemExit) as stop:
        cli.main(flags(finished, tmp_path / "cut"))
    assert stop.value.code == 143
    assert [p.name for p in checkpoint.steps(tmp_path / "cut/checkpoints")] == ["step-00000005"]
    monkeypatch.setattr(VaeStage, "step", step)
    assert cli.main(flags(finished, tmp_path / "cut", "--resume")) == 0
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 12


def test_micro_batches_and_workers_do_not_change_a_run(finished, tmp_path):
    assert cli.main(flags(finished, tmp_path / "whole")) == 0
    assert cli.main(flags(finished, tmp_path / "workers", "--workers", "2")) == 0
    assert weights(tmp_path / "workers") == weights(tmp_path / "whole")
    assert cli.main(flags(finished, tmp_path / "parts", "--micro-batches", "4")) == 0
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [parts[s] for s in whole] == pytest.approx([whole[s] for s in whole], rel=1e-4)


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(finished, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(flags(finished, out)) == 0
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and file.name != ".holder"}
    capsys.readouterr()
    assert cli.main(flags(finished, out)) == 0
    assert "is finished" in capsys.readouterr().out
    assert cli.main(flags(finished, out, "--lr", "0.5")) == 2
    message = capsys.readouterr().err
    assert "--lr 0.004, not 0.5" in message and "--fresh" in message
    unchanged = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and file.name != ".holder"}
    assert unchanged == before
    assert cli.main(flags(finished, out, "--lr", "0.5", "--fresh")) == 0


def test_resume_insists_on_something_to_go_on_from(finished, tmp_path, capsys):
    assert cli.main(flags(finished, tmp_path / "none", "--resume")) == 2
    assert "--resume" in capsys.readouterr().err


def test_changed_pictures_do_not_resume(finished, tmp_path, pictures, capsys):
    out = tmp_path / "run"
    assert cli.main(flags(finished, out, "--checkpoint-every", "6")) == 0
    (out / "finished.json").unlink()
    assert cli.main(["data", str(pictures), "--image-size", "16", "--fit", "stretch", "--out", str(tmp_path)]) == 0
    again = flags(finished, out, "--checkpoint-every", "6")
    again[1] = str(tmp_path / "data.json")
    assert cli.main(again) == 2
    assert "the data changed since this run began" in capsys.readouterr().err


def test_one_run_at_a_time_in_a_folder(finished, tmp_path):
    out = tmp_path / "run"
    words = flags(finished, out, "--steps", "100000")
    first = subprocess.Popen([sys.executable, "-m", "calotype", *words], stdout=subprocess.DEVNULL)
    try:
        while not (out / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.1)
        second = subprocess.run([sys.executable, "-m", "calotype", *words], capture_output=True, text=True, check=False)
        assert second.returncode == 2 and f"process {first.pid}" in second.stderr
    finally:
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 130
    assert checkpoint.load(out / "checkpoints") is not None


def test_a_loss_that_is_not_finite_stops_with_a_way_out(finished, tmp_path, capsys):
    assert cli.main(flags(finished, tmp_path / "run", "--optimizer", "sgd", "--lr", "100", "--clip", "1e6")) == 2
    assert "not finite" in capsys.readouterr().err


def test_the_last_steps_are_read_too(finished, tmp_path, monkeypatch, capsys):
    """A loss that is not finite in the last, incomplete window must not be saved or exported."""
    from calotype.stage1_vae.train import VaeStage

    step = VaeStage.step

    def broken(stage, batch, number):
        values = step(stage, batch, number)
        return values | {"loss": values["loss"] * float("nan")} if number == 11 else values

    words = flags(finished, tmp_path / "run", "--checkpoint-every", "4", "--log-every", "10")
    monkeypatch.setattr(VaeStage, "step", broken)
    assert cli.main(words) == 2
    assert "not finite at step 12" in capsys.readouterr().err
    assert checkpoint.steps(tmp_path / "run/checkpoints")[-1].name == "step-00000008"
    assert not (tmp_path / "run/vae").exists() and not (tmp_path / "run/finished.json").exists()
    monkeypatch.setattr(VaeStage, "step", step)
    assert cli.main(words) == 0
    assert max(losses(tmp_path / "run")) == 12


def test_a_repeated_sigterm_changes_nothing_and_a_later_ctrl_c_ends_it(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    with loop.Interruption() as interruption:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # as a launcher and a terminal send them
            os.kill(os.getpid(), number)
        assert interruption.exit_code == 143
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
