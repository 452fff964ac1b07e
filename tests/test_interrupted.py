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


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_killed_and_repeated_ends_with_the_same_bits(tmp_path, regularizer):
    benchmark("kill_resume", "--kills", 3, "--out", tmp_path, "--regularizer", regularizer)


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_two_processes_equal_one(tmp_path, regularizer):
    benchmark("processes", "--steps", 20, "--out", tmp_path, "--regularizer", regularizer)
