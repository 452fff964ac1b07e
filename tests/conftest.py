import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests at a time share the cores

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calotype import cli, shapes

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="the full sizes of the reliability tests")


@pytest.fixture(scope="session")
def sized(request):
    """How often something is tried: `sized(20, 200)` is 20 in CI and 200 with --nightly."""
    return lambda ci, nightly: nightly if request.config.getoption("--nightly") else ci


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 96 shapes of 16x16 pixels, a sub-folder a colour."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(96):
        factors = shapes.draw_factors(0, i, shapes.PLAIN)
        folder = root / factors.colour
        folder.mkdir(exist_ok=True)
        shapes.render(factors, (16, 16)).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="session")
def finished(pictures, tmp_path_factory):
    """A run of all stages, as short as can be: RUN/data.json, stage1_vae, latents, stage2_diffusion, pipeline."""
    out = tmp_path_factory.mktemp("run")
    vae, unet = ["--width", "8", "--factor", "2"], ["--width", "16", "--sampler-steps", "4"]
    length = ["--steps", "30", "--batch-size", "8", "--precision", "fp32", "--validations", "2"]
    for argv in (
        ["data", str(pictures), "--image-size", "16", "--out", str(out)],
        ["train-vae", str(out / "data.json"), *vae, *length, "--out", str(out / "stage1_vae")],
        ["encode", str(out / "data.json"), "--vae", str(out / "stage1_vae/vae"), "--out", str(out / "latents")]
        + ["--precision", "fp32", "--shard-size", "40"],
        ["train-diffusion", "--latents", str(out / "latents"), *unet, *length, "--out", str(out / "stage2_diffusion")],
        ["export", "--run", str(out)],
        ["evaluate", str(out), "--precision", "fp32"],
        ["report", str(out)],
    ):
        assert cli.main(argv) == 0, argv
    return out


@pytest.fixture(scope="session")
def two_numbers(pictures, tmp_path_factory):
    """A run that has stage 1 alone: an autoencoder of 12x12 pictures in two numbers, and their latents."""
    out = tmp_path_factory.mktemp("two") / "numbers"
    for argv in (
        ["data", str(pictures), "--image-size", "12", "--out", str(out)],
        ["train-vae", str(out / "data.json"), "--latent-dim", "2", "--beta", "1", "--lr", "1e-3", "--width", "8"]
        + ["--steps", "150", "--batch-size", "16", "--precision", "fp32", "--out", str(out / "stage1_vae")],
        ["encode", str(out / "data.json"), "--vae", str(out / "stage1_vae/vae"), "--out", str(out / "latents")],
    ):
        assert cli.main(argv) == 0, argv
    return out


@pytest.fixture
def run_benchmark():
    """Run one of the benchmarks to its end and insist on success."""

    def run(name, *words):
        command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, words)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run
