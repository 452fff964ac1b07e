"""No room on the disk: what was there stays, the run goes on, and its last state is insisted on."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calotype import checkpoint, cli, disk
from calotype.errors import UserError
from calotype.stage1_vae.train import VaeStage


@contextlib.contextmanager
def small_files(most):
    """No file may grow beyond `most` bytes; a write then fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def words(finished, out, *more):
    model = "--width 8 --factor 2 --batch-size 8 --precision fp32 --validations 1 --log-every 1 --steps 16".split()
    return ["train-vae", str(finished / "data.json"), *model, "--checkpoint-every", "4", "--out", str(out), *more]


def full_between(monkeypatch, first, last):
    """From one step to another no checkpoint fits."""
    step = VaeStage.step

    def taken(stage, batch, number):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        most = 30_000 if first <= number < last else hard
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        return step(stage, batch, number)

    monkeypatch.setattr(VaeStage, "step", taken)


def kept(out):
    return [int(path.name[-8:]) for path in checkpoint.steps(out / "checkpoints")]


def said(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["said"]) for line in lines if "said" in line]


def test_a_run_goes_on_and_saves_again_when_there_is_room(finished, tmp_path, monkeypatch):
    assert cli.main(words(finished, tmp_path / "whole")) == 0
    with small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1]):
        full_between(monkeypatch, 5, 12)
        out = tmp_path / "run"
        assert cli.main(words(finished, out)) == 0
    assert [step for step, text in said(out) if "no space left" in text and "tries again at the next" in text] == [
        8,
        12,
    ]
    assert kept(out) == [4, 16]
    assert checkpoint.weights_hash(out / "vae") == checkpoint.weights_hash(tmp_path / "whole/vae")


def test_the_last_state_is_tried_again_and_then_refused(finished, tmp_path, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(checkpoint.time, "sleep", waited.append)
    with small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1]):
        full_between(monkeypatch, 10, 99)
        assert cli.main(words(finished, tmp_path)) == 2
        message = capsys.readouterr().err
    assert "no space left" in message and "step 16" in message and "give the same command again" in message
    assert waited == [5.0, 15.0] and kept(tmp_path) == [4, 8]
    assert not list((tmp_path / "checkpoints").glob(".*")) and not (tmp_path / "finished.json").exists()
    monkeypatch.undo()
    assert cli.main(words(finished, tmp_path)) == 0 and kept(tmp_path) == [12, 16]


def test_room_made_while_it_waits_is_used(monkeypatch):
    attempts, lines = [], []

    def save():
        attempts.append(1)
        if len(attempts) < 3:
            raise disk.DiskFull("no space left")

    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: None)
    checkpoint.insist(save, lines.append, last=True)
    assert len(attempts) == 3 and len(lines) == 2


def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1190, 1190))
    with pytest.raises(disk.DiskFull):
        disk.refuse_full(tmp_path, 1000)
    disk.refuse_full(tmp_path, 990)
    written = []
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: written.append(1))
    with pytest.raises(UserError, match="no space left in .* step 3 .*MiB free"):
        checkpoint.save(tmp_path, 3, {"model": {"w": torch.zeros(1000)}}, {}, 1)
    assert not written and list(tmp_path.iterdir()) == []


@pytest.mark.reliability
def test_a_disk_of_eight_megabytes_that_fills_up(finished, tmp_path):
    """A real small disk: somebody else's file takes the rest of it, and later goes away."""
    place = tmp_path / "small"
    place.mkdir()
    script = f"mount -t tmpfs -o size=8m small {place} && exec {sys.executable} {__file__} {place} {finished}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    if not shutil.which("unshare") or subprocess.run([*command[:4], "true"], check=False).returncode:
        pytest.skip("no disk of one's own may be mounted here")
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0 and found["valid"] == found["steps"]
    assert [step for step, text in found["said"] if "for the checkpoint of step" in text] == [8, 12]
    assert [step for step, text in found["said"] if "samples/step-" in text] == [8, 12]
    assert found["lines"] == 16 and found["kept"] == [4, 16]  # what was not written while the disk was full came later


def on_the_small_disk(place, finished):
    """Run in a mount namespace of its own: fill the disk at step 5, free it at step 13, and look all the time."""
    step, ballast, valid = VaeStage.step, place / "ballast", []
    log = (place / "log").open("w", buffering=1)  # as in `calotype train-vae … > log`

    def watched(stage, batch, number):
        if number == 5:
            log.write(" " * (-log.tell() % 4096))  # no room is left in its last page
            with ballast.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
                while stream.write(bytes(1024)):
                    pass
        if number == 13:
            ballast.unlink()
        folders = checkpoint.steps(place / "run" / "checkpoints")
        valid.append(number < 5 or any(checkpoint.verify(folder) is None for folder in folders))
        return step(stage, batch, number)

    VaeStage.step = watched
    with contextlib.redirect_stdout(log):
        code = cli.main(words(finished, place / "run", "--validations", "4"))
    lines = (place / "run/metrics.jsonl").read_text().splitlines()
    taken = {json.loads(line)["step"] for line in lines if "loss[train]" in line}
    report = {"code": code, "valid": sum(valid), "steps": len(valid), "lines": len(taken)}
    print(json.dumps(report | {"kept": kept(place / "run"), "said": said(place / "run")}))


if __name__ == "__main__":
    on_the_small_disk(Path(sys.argv[1]), Path(sys.argv[2]))
