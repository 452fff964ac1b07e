"""`calotype run` from end to end, interrupted and repeated."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from calotype import checkpoint, cli

FLAGS = "--image-size 16 --factor 2 --steps 12 --batch-size 8 --precision fp32 --checkpoint-every 3".split()


def command(pictures, out, *more):
    return ["run", str(pictures), *FLAGS, "--out", str(out), *more]


def hashes(out):
    parts = ("stage1_vae/vae", "stage2_diffusion/unet", "pipeline/unet", "pipeline/vae")
    return [checkpoint.weights_hash(out / part) for part in parts]


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(command(pictures, out)) == 0
    return out


def test_everything_is_there_and_the_commands_can_be_typed(whole, capsys):
    for name in ("data.json", "metrics.json", "report.html", "pipeline/samples.png", "pipeline/README.md", "run.json"):
        assert (whole / name).is_file(), name
    commands = json.loads((whole / "run.json").read_text())["commands"]
    names = ["data", "train-vae", "encode", "train-diffusion", "export", "evaluate"]
    assert [entry["name"] for entry in commands] == names and all(entry["finished"] for entry in commands)
    for entry in commands:
        assert shlex.split(entry["command"])[:2] == ["calotype", entry["name"]]
        assert cli.main(shlex.split(entry["command"])[1:]) == 0, entry["command"]
    metrics = json.loads((whole / "metrics.json").read_text())
    assert set(metrics) == {"psnr[val]", "latent_std[val]", "diffusion_loss[val]"}
    assert all({"value", "n", "how"} == set(entry) for entry in metrics.values())
    assert 0.5 < metrics["latent_std[val]"]["value"] < 2


def test_interrupted_and_repeated_it_goes_on_to_the_same_bits(pictures, whole, tmp_path):
    """Killed in stage 1, stopped in stage 2."""
    out = tmp_path / "run"
    words = [sys.executable, "-m", "calotype", *command(pictures, out)]
    for stage, number, code in (("stage1_vae", signal.SIGKILL, -9), ("stage2_diffusion", signal.SIGINT, 130)):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not checkpoint.steps(out / stage / "checkpoints"):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(number)
        assert process.wait(60) == code
        assert not (out / stage / "finished.json").exists()
    assert cli.main(command(pictures, out)) == 0
    assert hashes(out) == hashes(whole)
    assert all(entry["finished"] for entry in json.loads((out / "run.json").read_text())["commands"])


def test_a_finished_run_with_other_settings_is_refused_and_left_as_it_was(pictures, whole, capsys):
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    assert cli.main(command(pictures, whole, "--objective", "v")) == 2
    message = capsys.readouterr().err
    assert "--objective by default, not v" in message and "--fresh" in message and message.count("\n") == 1
    assert {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--image-size", "18", "--factor", "4"], ["--image-size 18", "multiple of 4", "try 16"]),
        (["--image-size", "30"], ["--image-size 30", "multiple of 4", "try 28"]),
        (["--image-size", "0"], ["--image-size 0"]),
        (["--resume"], ["--resume"]),
        (["--resume", "--fresh"], ["--resume and --fresh"]),
        (["--vae", "/nowhere"], ["--vae /nowhere"]),
        (["--vae", "/nowhere", "--factor", "4"], ["--factor 4", "--vae"]),
        (["--batch-size", "32", "--nproc", "3"], ["--batch-size 32", "--nproc 3", "try 30"]),
        (["--config", "{config}"], ["objectif"]),
    ],
)
def test_a_run_that_cannot_work_says_so_at_once_and_leaves_nothing(pictures, tmp_path, capsys, words, parts):
    config = tmp_path / "config.json"
    config.write_text('{"objectif": "v"}')
    words = [word.format(config=config) for word in words]
    assert cli.main(["run", str(pictures), "--out", str(tmp_path / "x"), *words]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts) and message.count("\n") == 1, message
    assert not (tmp_path / "x").exists()


def test_mirror_images_of_shapes_are_refused_before_anything_is_trained(tmp_path, capsys):
    assert cli.main(["run", "shapes", "--flip", "--out", str(tmp_path / "x")]) == 2
    assert "--flip" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_folder_with_other_files_is_left_alone(pictures, whole, tmp_path, capsys):
    precious = tmp_path / "pipeline" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    for words in (
        command(pictures, tmp_path),
        command(pictures, tmp_path, "--fresh"),
        ["export", "--run", str(whole), "--out", str(tmp_path)],
        ["export", "--run", str(whole), "--out", str(precious.parent)],
        ["train-vae", str(whole / "data.json"), "--out", str(tmp_path), "--steps", "0", "--fresh"],
    ):
        (tmp_path / "samples").mkdir(exist_ok=True)
        assert cli.main(words) == 2, words
        assert "--out" in capsys.readouterr().err
        assert precious.read_text() == "years of work"


def test_a_moved_run_goes_on_in_its_new_place(pictures, whole, tmp_path):
    import shutil

    shutil.copytree(whole, tmp_path / "moved")
    log = json.loads((tmp_path / "moved/run.json").read_text())
    log["commands"] = log["commands"][:3]
    (tmp_path / "moved/run.json").write_text(json.dumps(log))
    shutil.rmtree(tmp_path / "moved/stage2_diffusion")
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()}
    assert cli.main(command(pictures, tmp_path / "moved")) == 0
    assert hashes(tmp_path / "moved") == hashes(whole)
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()} == before


def test_no_steps_means_no_steps(pictures, tmp_path):
    out = tmp_path / "run"
    assert cli.main([*command(pictures, out), "--steps", "0"]) == 0
    assert [
        json.loads((out / s / "finished.json").read_text())["steps"] for s in ("stage1_vae", "stage2_diffusion")
    ] == [0, 0]


def test_a_foreign_autoencoder_is_absorbed(pictures, whole, tmp_path):
    """Another scaling factor and no training: the latents of the saved copy have unit variance all the same."""
    import shutil

    shutil.copytree(whole / "stage1_vae/vae", tmp_path / "vae")
    config = tmp_path / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.18215}))
    out = tmp_path / "run"
    flags = "--image-size 16 --steps 3 --batch-size 8 --precision fp32".split()
    assert cli.main(["run", str(pictures), *flags, "--vae", str(tmp_path / "vae"), "--out", str(out)]) == 0
    saved = json.loads((out / "pipeline/vae/config.json").read_text())
    assert saved["scaling_factor"] == 1.0
    assert json.loads((out / "stage1_vae/finished.json").read_text())["steps"] == 0


def test_vq_and_v_prediction_and_two_processes_stopped_in_between(pictures, tmp_path):
    out = tmp_path / "run"
    more = ["--regularizer", "vq", "--objective", "v", "--nproc", "2", "--steps", "100"]
    words = [sys.executable, "-m", "calotype", *command(pictures, out, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    while not checkpoint.steps(out / "stage1_vae/checkpoints"):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    assert process.wait(90) == 130
    assert not (out / "stage1_vae/finished.json").exists()
    saved = checkpoint.steps(out / "stage1_vae/checkpoints")[-1]
    assert int(saved.name[5:]) % 3, "the state at the signal was not saved"
    subprocess.run(words, check=True, env=environment)
    words[words.index(str(out))] = str(tmp_path / "undisturbed")
    subprocess.run(words, check=True, env=environment)
    assert hashes(out) == hashes(tmp_path / "undisturbed")
    index = json.loads((out / "pipeline/model_index.json").read_text())
    assert index["vae"][1] == "VQModel"
    assert (
        json.loads((out / "pipeline/scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    )
    assert cli.main(["generate", str(out), "-n", "2", "--out", str(tmp_path / "samples")]) == 0
