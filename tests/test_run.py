"""`calotype run` from end to end, interrupted and repeated."""

import json
import os
import random
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
    assert [entry["argv"][0] for entry in commands] == names and all(entry["finished"] for entry in commands)
    for entry in commands:
        assert entry["command"].split()[:2] == ["calotype", entry["argv"][0]]
        assert cli.main(entry["argv"]) == 0, entry["command"]
    metrics = json.loads((whole / "metrics.json").read_text())
    assert set(metrics) == {"psnr[val]", "latent_std[val]", "diffusion_loss[val]"}
    assert all({"value", "n", "how"} == set(entry) for entry in metrics.values())
    assert 0.5 < metrics["latent_std[val]"]["value"] < 2


def test_interrupted_and_repeated_it_goes_on_to_the_same_bits(pictures, whole, tmp_path):
    out, instants = tmp_path / "run", random.Random(0)
    words = [sys.executable, "-m", "calotype", *command(pictures, out)]
    codes = []
    for wait in [instants.uniform(7, 14) for _ in range(3)]:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        process.send_signal(instants.choice([signal.SIGINT, signal.SIGKILL]))
        codes.append(process.wait(60))
    assert cli.main(command(pictures, out)) == 0
    assert hashes(out) == hashes(whole), codes
    capsys_free = json.loads((out / "run.json").read_text())["commands"]
    assert all(entry["finished"] for entry in capsys_free)


def test_a_finished_run_with_other_settings_is_refused_and_left_as_it_was(pictures, whole, capsys):
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    assert cli.main(command(pictures, whole, "--objective", "v")) == 2
    message = capsys.readouterr().err
    assert "--objective None, not v" in message and "--fresh" in message and message.count("\n") == 1
    assert {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--image-size", "18", "--factor", "4"], ["--image-size 18", "--factor 4", "try 16"]),
        (["--resume"], ["--resume"]),
        (["--vae", "/nowhere"], ["--init /nowhere"]),
    ],
)
def test_a_run_that_cannot_work_says_so_at_once(pictures, tmp_path, capsys, words, parts):
    assert cli.main(["run", str(pictures), "--out", str(tmp_path / "x"), *words]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message


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
    subprocess.run(words, check=True, env=environment)
    index = json.loads((out / "pipeline/model_index.json").read_text())
    assert index["vae"][1] == "VQModel"
    assert (
        json.loads((out / "pipeline/scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    )
    assert cli.main(["generate", str(out), "-n", "2", "--out", str(tmp_path / "samples")]) == 0
