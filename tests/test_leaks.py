"""Thousands of steps: memory, open files and threads stay as they are."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.reliability

# Runs a command with a look at its own process now and then; in a process of its own, because memory is counted.
WATCHED = """
import gc, json, os, sys, threading
import torch
torch.set_num_threads(1)
from calotype import cli
from calotype.stage1_vae.train import VaeStage
from calotype.stage2_diffusion.train import DiffusionStage

every, file, *argv = sys.argv[1:]
seen, KINDS = [], (torch.Tensor, torch.nn.Parameter)

def watch(stage_class):
    step = stage_class.step
    def watched(stage, batch, number):
        if number % int(every) == 0:
            gc.collect()
            pages = int(open("/proc/self/statm").read().split()[1])
            resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            threads = int(next(l for l in open("/proc/self/status") if l.startswith("Threads")).split()[1])
            tensors = {id(o): o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) in KINDS}
            alive = sum(tensors.values()) / 2**20
            seen.append([number, resident, len(os.listdir("/proc/self/fd")), threads, alive])
        return step(stage, batch, number)
    stage_class.step = watched

watch(VaeStage), watch(DiffusionStage)
code = cli.main(argv)
json.dump(seen, open(file, "w"))
sys.exit(code)
"""
VAE = "--width 4 --factor 2 --batch-size 4 --validations 4 --precision fp32 --checkpoint-every 100".split()
GAN = "--regularizer vq --codebook 16 --perceptual features --adversarial 0.5 --adversarial-start 0.1".split()
UNET = "--width 8 --batch-size 4 --validations 4 --precision fp32 --checkpoint-every 100 --kid-samples 0".split()


def flags(finished, stage):
    if stage == "train-vae":
        return ["train-vae", str(finished / "data.json"), *VAE, *GAN]
    latents, vae = finished / "latents", finished / "stage1_vae/vae"
    return ["train-diffusion", "--latents", str(latents), "--vae", str(vae), "--sampler-steps", "2", *UNET]


def slope(steps, values):
    """The median slope over all pairs (Theil 1950; Sen 1968): a few jumps of the allocator do not decide it."""
    i, j = np.triu_indices(len(steps), 1)
    return float(np.median((values[j] - values[i]) / (steps[j] - steps[i])))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("stage", ["train-vae", "train-diffusion"])
def test_memory_files_and_threads_stay_as_they_are(finished, tmp_path, stage, sized):
    steps, looks = sized(300, 5000), sized(30, 100)
    words = [*flags(finished, stage), "--steps", str(steps), "--out", str(tmp_path / "run")]
    command = [sys.executable, "-c", WATCHED, str(steps // looks), str(tmp_path / "seen.json"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = np.array(json.loads((tmp_path / "seen.json").read_text()))
    assert len(seen) == looks
    warm = seen[len(seen) // 3 :]  # what is kept from then on has been seen: pictures, orders, a discriminator
    number, resident, files, threads, alive = warm.T
    a_thousand = 1000 * slope(number, resident)
    print(f"{stage}: {steps} steps, {resident[-1]:.0f} MB, {a_thousand:+.3f} MB a thousand steps")
    third = len(resident) // 3
    grown = np.median(resident[-third:]) - np.median(resident[:third])
    assert a_thousand <= 1.0 or grown <= sized(8.0, 1.0)  # in few steps the allocator's pages are a steep slope
    assert alive[-third:].max() <= alive[:third].max() + 0.01  # what Python holds on to is exact in few steps too
    assert files.max() - files.min() <= 1 and threads.max() == threads.min()
    assert files[-1] <= files[0] and threads[-1] <= threads[0]
