"""The losses of the first steps of four recipes, as they were recorded: no change of the arithmetic goes unseen.

Where torch and the class of the machine are those of the record, every loss must be the same to the bit; elsewhere the
mathematics is the same and the rounding is not, so a loss may be 1e-5 away. After a change that is meant to change
losses: `RECORD_GOLDEN_LOSSES=1 python -m pytest -m reliability tests/test_golden_losses.py`, and commit the file.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).with_name("golden_losses.json")
STEPS = 50
TINY = f"--batch-size 8 --precision fp32 --log-every 1 --steps {STEPS} --lr 1e-3".split()
VAE = ["--width", "8", "--factor", "2"]
UNET = "--width 16 --validations 1 --kid-samples 0 --sampler-steps 2".split()
GAN = "--regularizer vq --codebook 32 --perceptual features --adversarial 0.5 --adversarial-start 0".split()
RECIPES = {
    "kl": ["train-vae", *VAE, "--validations", "1"],
    "vq and discriminator": ["train-vae", *VAE, *GAN, "--adversarial-pretraining", "5", "--validations", "10"],
    "flow by class": ["train-diffusion", *UNET],
    "repainting": ["train-diffusion", *UNET, "--condition", "inpaint"],
}

pytestmark = pytest.mark.reliability


def machine():
    """What the kernels of torch choose by: the kind of processor and its vector instructions."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        cpu = {name.strip(): value.strip() for name, _, value in reversed(lines)}
        kind = f"{cpu['vendor_id']} {cpu['cpu family']}/{cpu['model']}"
    except (OSError, KeyError):
        kind = platform.processor()
    return f"{platform.machine()} {kind} {torch.backends.cpu.get_cpu_capability()}"


def here():
    return {"torch": torch.__version__, "machine": machine()}


def write_pictures(folder):
    """Smooth pictures of two classes that depend on no library's way of drawing."""
    from PIL import Image

    from calotype.randomness import uniform

    for i in range(48):
        corners = uniform(0, "golden pictures", i, 1, (3, 4))[0].reshape(3, 2, 2)
        x = torch.linspace(0, 1, 16)
        rows = corners[:, :1] * (1 - x)[None, :, None] + corners[:, 1:] * x[None, :, None]  # (3, 16, 2)
        picture = rows[..., :1] * (1 - x) + rows[..., 1:] * x
        place = folder / ("odd" if i % 2 else "even")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()).save(place / f"{i:02d}.png")


def prepare(out):
    """Pictures, their sheet, an autoencoder that has learnt nothing, and latents."""
    from calotype import cli

    write_pictures(out / "pictures")
    sheet, vae = str(out / "data.json"), str(out / "stage1_vae" / "vae")
    untrained = ["--width", "8", "--factor", "2", "--steps", "0", "--precision", "fp32", "--validations", "1"]
    for argv in (
        ["data", str(out / "pictures"), "--image-size", "16", "--val", "0.2", "--out", str(out)],
        ["train-vae", sheet, *untrained, "--out", str(out / "stage1_vae")],
        ["encode", sheet, "--vae", vae, "--precision", "fp32", "--out", str(out / "latents")],
    ):
        assert cli.main(argv) == 0, argv


def losses(out, name, folder):
    """The losses of a recipe, step by step, and those of the discriminator where it learns alone."""
    from calotype import cli

    command, *flags = RECIPES[name]
    source = [str(out / "data.json")] if command == "train-vae" else ["--latents", str(out / "latents")]
    assert cli.main([command, *source, *TINY, *flags, "--out", str(folder)]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss[train]", line.get("discriminator[train]")) for line in lines if "lr" in line]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("golden")
    prepare(out)
    return out


@pytest.mark.parametrize("name", RECIPES)
def test_the_losses_are_those_that_were_recorded(prepared, tmp_path, name):
    found = losses(prepared, name, tmp_path / "run")
    assert len(found) == STEPS
    if os.environ.get("RECORD_GOLDEN_LOSSES"):
        record(name, found)
    recorded = json.loads(FILE.read_text())
    expected = recorded["losses"][name]
    if {key: recorded[key] for key in here()} == here():
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=1e-5)


def record(name, found):
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    kept = known.get("losses", {}) if {key: known.get(key) for key in here()} == here() else {}
    FILE.write_text(json.dumps(here() | {"losses": kept | {name: found}}, indent=1) + "\n")


def test_another_class_of_machine_is_as_near_as_is_promised(prepared, tmp_path):
    """The same machine without its vector instructions, as torch's kernels choose them; the recipe that strays most."""
    name = "vq and discriminator"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += "import json, pathlib, torch, test_golden_losses as golden\n"
    code += "torch.set_num_threads(1)\n"
    code += f"out, run = map(pathlib.Path, {[str(prepared), str(tmp_path / 'run')]!r})\n"
    code += f"found = golden.losses(out, {name!r}, run)\n"
    code += "print(json.dumps([golden.machine(), found]))"
    plain = {"ATEN_CPU_CAPABILITY": "default", "DNNL_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    environment = os.environ | plain | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    other, found = json.loads(done.stdout.splitlines()[-1])
    assert other != machine()
    assert found == pytest.approx(json.loads(FILE.read_text())["losses"][name], rel=1e-5)
