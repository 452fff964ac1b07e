"""Settings that are accepted really run: one step, or a drawing, with values from all over their range."""

import random
import shutil
import signal
import traceback
import warnings

import pytest
from PIL import Image

from calotype import cli, shapes

pytestmark = pytest.mark.reliability

PACE = {
    "batch_size": "1 2 3 5 8",
    "micro_batches": "1 1 1 2 3",
    "lr": "1e-12 1e-3 1 100",
    "lr_schedule": "cosine constant",
    "warmup_steps": "0 1 1000000000",
    "optimizer": "adamw muon sgd",
    "weight_decay": "0 0.1 10",
    "clip": "1e-9 1 1000000",
    "seed": "0 9223372036854775807",
    "precision": "auto fp32 bf16",
    "validations": "1 2 1000000",
    "log_every": "1 2",
    "checkpoint_every": "1 7",
    "keep_checkpoints": "1 3",
    "max_minutes": "0.0001",
    "preset": "tiny tiny small",
}
VALUES = {
    "train-vae": PACE
    | {
        "image_size": "1 2 5 8 12 16 20 16x24 33",
        "fit": "crop pad stretch",
        "channels": "1 3",
        "val": "0.01 0.5 0.99",
        "width": "4 5 6 7 8 12 31",
        "factor": "2 4 8 16 32",
        "layers": "1 2",
        "latent_channels": "1 2 3 5",
        "attention": "",
        "latent_dim": "1 2 7",
        "regularizer": "none kl tc vq fsq",
        "beta": "0 1e-6 1 1000000",
        "likelihood": "gaussian laplace bernoulli",
        "likelihood_scale": "1e-4 1 100",
        "gamma": "0 1 1000000",
        "posterior_std": "1e-6 1 100",
        "learn_variance": "",
        "beta_warmup": "0 1 1000000000",
        "free_bits": "0 0.5 1000000",
        "free_bits_per_sample": "",
        "codebook": "2 3 16",
        "commitment": "0 1 1000000",
        "levels": "2 2,2 3,5 8,5,5,5 262144",
        "corruption": "gaussian:1e-9 gaussian:10 mask:1 salt:0.5",
        "reconstruction": "l1 mse",
        "perceptual": "none features lpips",
        "perceptual_weight": "1e-9 1000000",
        "adversarial": "0.5 1000000",
        "adversarial_start": "0 0.99 plateau",
        "adversarial_pretraining": "0 1",
        "adversarial_cap": "1e-9 1000000",
        "r1": "0 1000000",
        "max_psnr_drop": "1e-9 1000",
        "discriminator_lr": "1e-9 100",
        "flip": "",
        "workers": "0 1",
    },
    "train-diffusion": PACE
    | {
        "width": "8 9 10 12 17 24 40",
        "depth": "1 2 3 5",
        "layers": "1 2",
        "attention": "",
        "gradient_checkpointing": "",
        "condition": "none class text inpaint edges superres:2 superres:4 superres:16",
        "text_width": "16 48",
        "text_layers": "1 2",
        "label_dropout": "0 0.5 1",
        "objective": "flow v epsilon x0",
        "density": "uniform logit-normal mode",
        "time_mean": "-10 0 10",
        "time_std": "1e-6 10",
        "weighting": "none min-snr edm uncertainty",
        "zero_terminal_snr": "",
        "ema_width": "1e-6 0.27",
        "no_snapshots": "",
        "kid_samples": "0 1 2 3",
        "guidance": "0 1 100",
        "sampler_steps": "1 2",
    },
    "generate": {
        "n": "1 2",
        "seed": "0 9223372036854775000",
        "steps": "1 2",
        "sampler": "ddim dpm++2m unipc heun euler flow-euler nonsense",
        "guidance": "0 1 100",
        "guidance_rescale": "0 1",
        "fast": "",
        "reproducible": "",
        "batch_size": "1 3",
        "precision": "auto fp32 bf16",
        "size": "8 16 24 17 16x40",
        "image": "here.png nowhere.png",
        "mask": "here.png",
    },
}
LONGEST = 300  # seconds of one command line, on a machine that does other things too
COMMANDS = ["train-vae"] * 5 + ["train-diffusion"] * 4 + ["generate"]


@pytest.fixture(scope="module")
def sources(pictures, tmp_path_factory):
    """Pictures of several kinds: with classes, with captions, three grey ones of odd sizes, a single one."""
    root = tmp_path_factory.mktemp("sources")
    captioned, grey, single = (root / name for name in ("captioned", "grey", "single"))
    for folder in (captioned, grey, single):
        folder.mkdir()
    for i in range(6):
        factors = shapes.draw_factors(0, i, shapes.PLAIN)
        shapes.render(factors, (16, 16)).save(captioned / f"{i}.png")
        (captioned / f"{i}.txt").write_text(factors.caption)
    for i, size in enumerate([(13, 20), (5, 40), (16, 16)]):
        Image.linear_gradient("L").resize(size).save(grey / f"{i}.png")
    Image.linear_gradient("L").resize((9, 9)).save(single / "only.png")
    return {"classes": pictures, "captions": captioned, "grey": grey, "single": single}


@pytest.fixture(scope="module")
def caches(sources, finished, two_numbers, tmp_path_factory):
    """Latents of several kinds."""
    out = tmp_path_factory.mktemp("captioned") / "run"
    vae = "--width 8 --factor 2 --steps 2 --batch-size 2 --precision fp32".split()
    for argv in (
        ["data", str(sources["captions"]), "--image-size", "16", "--out", str(out)],
        ["train-vae", str(out / "data.json"), *vae, "--out", str(out / "stage1_vae")],
        ["encode", str(out / "data.json"), "--vae", str(out / "stage1_vae/vae"), "--out", str(out / "latents")],
    ):
        assert cli.main(argv) == 0
    return [finished / "latents", two_numbers / "latents", out / "latents"]


def fair(law, number, places):
    """A command line with a few flags, their values from all over their range."""
    command = law.choice(COMMANDS)
    words = [command, *law.choice(places[command]), "--out", f"out{number}"]
    for name in law.sample(sorted(VALUES[command]), law.randint(1, 6)):
        value = law.choice(VALUES[command][name].split() or [""])
        words += [f"--{name.replace('_', '-')}", *([value] if value else [])]
    if command != "generate":
        words += [] if "--max-minutes" in words else ["--steps", "1"]
        words += [] if "--width" in words else ["--width", "8"]
    return words


def outcome(words, capsys):
    """The exit code, and what was said last; a traceback, of a hang too, counts as what was said."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(LONGEST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code = cli.main(words)
        except BaseException:
            return None, traceback.format_exc()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
    said = capsys.readouterr().err.splitlines()
    return code, said[-1] if code else ""


def test_settings_that_are_accepted_run(sized, sources, caches, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((16, 16)).save("here.png")
    places = {
        "train-vae": [[str(folder)] for folder in sources.values()],
        "train-diffusion": [["--latents", str(folder)] for folder in caches],
        "generate": [[str(finished)]],
    }
    wanted, ran, refusals, faults, number = sized(12, 110), 0, [], [], 0
    while ran < wanted:
        number += 1
        words = fair(random.Random(number), number, places)
        code, said = outcome(words, capsys)
        if code == 0:
            ran += 1
        elif code == 2 and said.startswith("calotype: ") and ("--" in said or "SOURCE" in said):
            refusals.append(said)
        else:
            faults.append(f"$ calotype {' '.join(words)}\n{said}")
            print(faults[-1])
        shutil.rmtree(f"out{number}", ignore_errors=True)
    assert not faults, "\n\n".join(faults)
    with capsys.disabled():
        print(f"\n{ran} ran, {len(refusals)} were refused")
