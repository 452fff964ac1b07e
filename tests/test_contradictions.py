"""Settings that contradict each other or what they are about: one sentence that names them, and no step is taken."""

import json
import shutil

import pytest
from PIL import Image

from calotype import cli, shapes

# Told by the settings alone, before anything is read or torch is imported: (command line, what the sentence names).
ALONE = [
    ("train-vae shapes --out x --batch-size 10 --micro-batches 3", "--batch-size 10 --micro-batches 3 try 9"),
    ("train-vae shapes --out x --image-size 30 --factor 4", "--image-size 30 --factor try 28"),
    ("train-vae shapes --out x --image-size 32x30 --factor 8", "--image-size 32x30 --factor try 32x24"),
    ("train-vae shapes --out x --codebook 64", "--codebook 64 --regularizer vq"),
    ("train-vae shapes --out x --codebook 1 --regularizer vq", "--codebook 1 2 or more"),
    ("train-vae shapes --out x --levels 8,8", "--levels 8,8 --regularizer fsq"),
    ("train-vae shapes --out x --levels 8,1 --regularizer fsq", "--levels 8,1 2 or more"),
    ("train-vae shapes --out x --levels 999,999,999 --regularizer fsq", "--levels 999,999,999 262,144"),
    ("train-vae shapes --out x --levels 5,4 --regularizer fsq --latent-dim 3", "--latent-dim 3 --levels 5,4"),
    ("train-vae shapes --out x --gamma 5", "--gamma 5 --regularizer tc"),
    ("train-vae shapes --out x --commitment 1", "--commitment 1 --regularizer vq"),
    ("train-vae shapes --out x --beta 1 --regularizer vq", "--beta 1 --regularizer kl or tc"),
    ("train-vae shapes --out x --free-bits 1 --regularizer none", "--free-bits 1 --regularizer kl or tc"),
    ("train-vae shapes --out x --free-bits-per-sample", "--free-bits-per-sample --free-bits"),
    ("train-vae shapes --out x --beta 1 --reconstruction l1", "--reconstruction l1 --likelihood laplace"),
    ("train-vae shapes --out x --likelihood-scale 0.1", "--likelihood-scale 0.1 --likelihood"),
    ("train-vae shapes --out x --likelihood bernoulli --likelihood-scale 0.1", "--likelihood-scale 0.1 bernoulli"),
    ("train-vae shapes --out x --perceptual-weight 2", "--perceptual-weight 2 --perceptual"),
    ("train-vae shapes --out x --adversarial-start 1", "--adversarial-start 1 try 0.5"),
    ("train-vae shapes --out x --corruption mask:2", "--corruption mask:2 try gaussian:0.3"),
    ("train-vae shapes --out x --init v --latent-dim 2", "--latent-dim 2 --init"),
    ("train-vae shapes --out x --flip", "--flip captions"),
    ("train-vae shapes --out x --optimizer sgd --weight-decay 0.1", "--weight-decay 0.1 --optimizer sgd"),
    ("train-vae shapes --out x --resume --fresh", "--resume --fresh"),
    ("train-diffusion --latents l --out x --objective flow --zero-terminal-snr", "--zero-terminal-snr --objective v"),
    ("train-diffusion --latents l --out x --text-encoder e", "--text-encoder e --condition text"),
    ("train-diffusion --latents l --out x --text-width 64", "--text-width 64 --condition text"),
    ("train-diffusion --latents l --out x --guidance 2 --condition none", "--guidance 2 --condition none"),
    ("train-diffusion --latents l --out x --guidance 2 --label-dropout 0", "--guidance 2 --label-dropout"),
    ("train-diffusion --latents l --out x --density uniform --time-std 2", "--time-std 2 --density logit-normal"),
    ("train-diffusion --latents l --out x --ema-width 0.3", "--ema-width 0.3 less than 0.28"),
    ("train-diffusion --latents l --out x --condition superres:3", "--condition superres:3"),
    ("distill r --student-steps 8 --teacher-steps 4", "--student-steps 8 --teacher-steps 4"),
    ("posthoc-ema r --width 0.1 --until 5", "--until 5 --out"),
    ("run shapes --out x --flip", "--flip captions"),
    ("run shapes --out x --image-size 30", "--image-size 30 --factor try 28"),
    ("run shapes --out x --batch-size 9 --nproc 2", "--batch-size 9 --nproc 2 try 8"),
    ("run shapes --out x --vae v --regularizer vq", "--regularizer vq --vae"),
    ("run shapes --out x --condition colour", "--condition colour"),
    ("run shapes --out x --val 1.5", "--val 1.5 try --val 0.05"),
    ("generate m --out x --guidance-interval 0.8 0.2", "--guidance-interval 0.8 0.2"),
    ("generate m --out x --seed 9223372036854775807", "--seed 9223372036854775807"),
    ("edit m --out x --image i --plus p", "--plus --minus"),
    ("edit m --out x --image i --plus p --minus q --strength 1", "--plus --minus --strength"),
    ("evaluate r --samples s --steps 5", "--steps 5 --samples s"),
    ("likelihood r --exact-trace --probes 3", "--probes 3 --exact-trace"),
    ("likelihood r --tolerance 0.1", "--tolerance 0.1 --solver dopri5"),
    ("likelihood r --solver dopri5 --ode-steps 3", "--ode-steps 3 --solver"),
    ("export --run r --stock --onnx", "--stock --onnx"),
    ("export --run r --ort o", "--ort o --explorer"),
    ("demo m --host 0.0.0.0", "--host 0.0.0.0 --public"),
    ("demo m --no-auth", "--no-auth --public"),
]


def refused(capsys, words, parts):
    """Insist on one line on stderr that holds all these words, and on exit code 2."""
    assert cli.main([str(word) for word in words]) == 2, words
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("calotype: "), message
    assert all(part in message for part in parts.split()), message
    return message


@pytest.mark.parametrize(("line", "parts"), ALONE, ids=[line for line, _ in ALONE])
def test_settings_that_contradict_each_other(line, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(capsys, line.split(), parts)
    assert list(tmp_path.iterdir()) == [], "something was begun"


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """Four pictures without classes and captions, and a run's data sheet of them."""
    root = tmp_path_factory.mktemp("flat")
    (root / "pictures").mkdir()
    for i in range(4):
        shapes.render(shapes.draw_factors(0, i, shapes.PLAIN), (16, 16)).save(root / "pictures" / f"{i}.png")
    assert cli.main(["data", str(root / "pictures"), "--image-size", "16", "--out", str(root / "run")]) == 0
    return root


def no_steps(out):
    return not list(out.glob("**/metrics.jsonl")) and not list(out.glob("**/checkpoints"))


WITH_PICTURES = [
    ("train-vae {flat}/pictures --out {flat}/pictures/run", "--out SOURCE outside"),
    ("data {flat}/pictures --out {flat}/pictures", "--out SOURCE outside"),
    ("run {flat}/pictures --out {flat}/pictures/run", "--out SOURCE outside"),
    ("train-vae {flat}/pictures --out x --val {flat}/pictures", "--val SOURCE outside"),
    ("train-vae {flat}/pictures --out x --val {flat}", "--val SOURCE another"),
    ("train-vae {flat}/pictures --out x --val {flat}/nowhere", "--val nowhere"),
    ("train-vae {flat}/run/data.json --out x --image-size 32", "--image-size 32"),
    ("train-vae {flat}/run/data.json --out x --channels 1", "--channels 1"),
    ("train-vae {flat}/run/data.json --out x --factor 32 --width 8", "--image-size 16x16 --factor"),
    ("train-vae {flat}/run/data.json --out x --init {vae} --regularizer vq", "--regularizer vq --init"),
    ("train-vae {flat}/run/data.json --out x --init {flat}", "--init not a saved autoencoder"),
    ("run {flat}/pictures --image-size 16 --out x --condition class", "--condition class classes"),
    ("run {flat}/pictures --image-size 16 --out x --condition text", "--condition text caption"),
    ("run {flat}/pictures --image-size 8 --out x --condition superres:16", "--condition superres:16 try"),
    ("encode {flat}/run/data.json --vae {vae} --out {vae}", "--out own"),
    ("train-diffusion --latents {latents} --out x --condition text", "--condition text caption"),
    ("train-diffusion --latents {latents} --vae {other} --out x", "--vae another autoencoder"),
    ("train-diffusion --latents {latents} --out {latents}", "--out latents own"),
    ("train-diffusion --latents {latents} --data {flat}/run/data.json --out x --condition edges", "--data --latents"),
    ("train-diffusion --latents {latents} --init {run} --width 16 --condition none --out x", "--init classes"),
    ("train-diffusion --latents {flat}/pictures --out x", "--latents calotype encode"),
    ("distill {flat}/run", "RUN calotype train-diffusion"),
]


@pytest.mark.parametrize(("line", "parts"), WITH_PICTURES, ids=[line for line, _ in WITH_PICTURES])
def test_settings_that_contradict_what_they_are_about(line, parts, flat, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(finished / "stage1_vae/vae", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    places = {"flat": flat, "run": finished, "vae": finished / "stage1_vae/vae"}
    places |= {"latents": finished / "latents", "other": other}
    refused(capsys, [word.format(**places) for word in line.split()], parts)
    assert no_steps(tmp_path)


def test_there_are_enough_of_them():
    assert len(ALONE) + len(WITH_PICTURES) >= 40


def test_a_folder_of_pictures_beside_a_run_is_no_contradiction(tmp_path, capsys):
    """What lies above or beside the pictures is a fair place for a run."""
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.linear_gradient("L").resize((8, 8)).save(tmp_path / "pictures" / f"{i}.png")
    for out in (tmp_path / "pictures-run", tmp_path / "run"):
        words = ["data", tmp_path / "pictures", "--image-size", "8", "--out", out]
        assert cli.main([str(word) for word in words]) == 0, capsys.readouterr().err
