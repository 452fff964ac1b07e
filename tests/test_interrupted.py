"""SIGKILL at random instants, and several processes: the short form of the two benchmarks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def benchmark(name, *words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stages(member, *names):
    """Stage 2 needs no repetition for every member of stage 1's family."""
    return ["--stages", *(names if member == "kl" else names[:1])]


@pytest.mark.parametrize("member", ["kl", "vq", "fsq", "tc", "gan"])
def test_killed_and_repeated_ends_with_the_same_bits(tmp_path, member):
    names = stages(member, "stage1", "stage2")
    benchmark("kill_resume", "--kills", 3, "--out", tmp_path, "--member", member, *names)


@pytest.mark.parametrize("member", ["kl", "vq", "fsq", "tc", "gan"])
def test_two_processes_equal_one(tmp_path, member):
    names = stages(member, "train-vae", "train-diffusion")
    benchmark("processes", "--steps", 20, "--out", tmp_path, "--member", member, *names)
