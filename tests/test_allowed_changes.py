"""Runs that really go on with another setting: announced, written down, and without a bit of harm to the rest."""

import json
import shutil

import pytest

from calotype import checkpoint, cli

TINY = "--image-size 16 --precision fp32 --validations 1 --checkpoint-every 3 --batch-size 8".split()
VAE = ["--width", "8", "--factor", "2", *TINY]


@pytest.fixture(scope="module")
def stopped(pictures, tmp_path_factory):
    """A run of stage 1 that ended after six steps."""
    out = tmp_path_factory.mktemp("stopped") / "vae"
    assert cli.main(["train-vae", str(pictures), *VAE, "--steps", "6", "--out", str(out)]) == 0
    return out


@pytest.fixture
def begun(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "vae")


def goes_on(capsys, *words, code=0):
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


def entries(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run_goes_on_with_more_steps_and_other_allowed_settings(pictures, begun, capsys):
    changes = ["--steps", "9", "--lr", "1e-4", "--clip", "0.5", "--micro-batches", "2", "--weight-decay", "0.1"]
    said = goes_on(capsys, "train-vae", pictures, *VAE, *changes, "--out", begun)
    assert "goes on at step 6" in said
    for line in ("--steps 6 -> 9", "--lr 0.004 -> 0.0001", "--clip 1.0 -> 0.5", "--micro-batches 1 -> 2"):
        assert line in said
        assert any(line in entry.get("said", "") and entry["step"] == 6 for entry in entries(begun))
    config = json.loads((begun / "config.json").read_text())
    assert (config["steps"], config["lr"], config["clip"], config["micro_batches"]) == (9, 1e-4, 0.5, 2)
    assert json.loads((begun / "finished.json").read_text())["steps"] == 9
    assert max(entry["lr"] for entry in entries(begun) if entry["step"] > 6 and "lr" in entry) <= 1e-4
    # the same command again finds a finished run, and says nothing of changes
    assert "->" not in goes_on(capsys, "train-vae", pictures, *VAE, *changes, "--out", begun)


def test_a_change_that_comes_after_the_end_is_refused_and_changes_nothing(pictures, begun, capsys):
    before = {file: file.read_bytes() for file in begun.rglob("*") if file.is_file()}
    words = ["train-vae", pictures, *VAE, "--steps", "6", "--lr", "1e-4", "--out", begun]
    message = goes_on(capsys, *words, code=2)
    assert "--lr 0.004, not 0.0001" in message and "more --steps" in message
    assert {file: file.read_bytes() for file in begun.rglob("*") if file.is_file()} == before


def test_fewer_steps_than_were_taken_end_an_unfinished_run(pictures, begun, capsys):
    (begun / "finished.json").unlink()
    shutil.rmtree(begun / "vae")
    said = goes_on(capsys, "train-vae", pictures, *VAE, "--steps", "4", "--out", begun)
    assert "--steps 6 -> 4" in said
    assert json.loads((begun / "finished.json").read_text())["steps"] == 6
    assert (begun / "vae/config.json").is_file()


def test_what_is_free_changes_no_bit(pictures, tmp_path, capsys):
    """Stopped half way and gone on with other workers, intervals and trackers: the same weights."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    law = ["train-vae", pictures, *VAE, "--steps", "8"]
    goes_on(capsys, *law, "--out", whole)
    goes_on(capsys, *law, "--out", parts)
    (parts / "finished.json").unlink()
    for name in ("vae", checkpoint.steps(parts / "checkpoints")[-1]):
        shutil.rmtree(parts / name)
    left = [int(folder.name[5:]) for folder in checkpoint.steps(parts / "checkpoints")]
    assert left and max(left) < 8
    free = ["--workers", "1", "--log-every", "1", "--checkpoint-every", "2", "--keep-checkpoints", "1"]
    said = goes_on(capsys, *law, *free, "--out", parts)
    assert "goes on at step" in said and "->" not in said
    assert checkpoint.weights_hash(parts / "vae") == checkpoint.weights_hash(whole / "vae")


def test_memory_that_ran_out_once_does_not_win_over_what_is_asked_for(finished, tmp_path, capsys):
    """A checkpoint remembers in how many parts a batch fits; --micro-batches given anew counts."""
    law = ["train-diffusion", "--latents", finished / "latents", "--width", "16", "--precision", "fp32"]
    law += ["--batch-size", "8", "--kid-samples", "0", "--validations", "1", "--out", tmp_path / "unet"]
    goes_on(capsys, *law, "--steps", "2", "--micro-batches", "4")
    said = goes_on(capsys, *law, "--steps", "4", "--micro-batches", "2")
    assert "--micro-batches 4 -> 2" in said
    last = checkpoint.steps(tmp_path / "unet/checkpoints")[-1]
    assert json.loads((last / "state.json").read_text())["stage"]["memory"]["parts"] == 2


@pytest.mark.reliability
def test_the_second_half_of_a_distillation_goes_on_alone(finished, tmp_path, capsys):
    """The student is finished and left as it is; more steps and another rate of the decoder are the decoder's."""
    law = ["distill", finished, "--out", tmp_path / "few", "--batch-size", "8", "--precision", "fp32"]
    law += ["--steps", "2", "--teacher-steps", "4", "--decoder-width", "8", "--validations", "1"]
    goes_on(capsys, *law, "--decoder-steps", "2")
    student = checkpoint.weights_hash(tmp_path / "few/student")
    said = goes_on(capsys, *law, "--decoder-steps", "4", "--decoder-lr", "1e-3")
    assert "distill student: " in said and "is finished" in said
    assert "--decoder-steps 2 -> 4" in said and "--decoder-lr 0.006 -> 0.001" in said
    assert checkpoint.weights_hash(tmp_path / "few/student") == student
    assert json.loads((tmp_path / "few/decoder_training/finished.json").read_text())["steps"] == 4


@pytest.mark.reliability
def test_a_whole_run_goes_on_with_its_second_stage(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    run = ["run", pictures, "--image-size", "16", "--factor", "2", "--batch-size", "8", "--out", out]
    goes_on(capsys, *run, "--steps", "3", "--precision", "fp32")
    first = {name: checkpoint.weights_hash(out / name) for name in ("stage1_vae/vae", "pipeline/unet")}
    message = goes_on(capsys, *run, "--steps", "3", "--precision", "fp32", "--lr", "1e-4", code=2)
    assert "--lr by default, not 0.0001" in message and "--steps" in message
    said = goes_on(capsys, *run, "--steps", "5", "--precision", "fp32", "--lr", "1e-4")
    for line in ("--steps 3 -> 5", "--lr by default -> 0.0001", "train-vae is finished and stays"):
        assert line in said, said
    assert "train-diffusion: goes on at step 3" in said
    now = {name: checkpoint.weights_hash(out / name) for name in first}
    assert now["stage1_vae/vae"] == first["stage1_vae/vae"] and now["pipeline/unet"] != first["pipeline/unet"]
    log = json.loads((out / "run.json").read_text())
    assert [change["setting"] for change in log["changes"]] == ["--steps", "--lr"]
    assert all(entry["finished"] for entry in log["commands"])
    assert json.loads((out / "config.json").read_text())["steps"] == 5
    assert "->" not in goes_on(capsys, *run, "--steps", "5", "--precision", "fp32", "--lr", "1e-4")
