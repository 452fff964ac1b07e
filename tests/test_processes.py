"""Two processes against one: the short form of the benchmark."""

import pytest


@pytest.mark.parametrize("member", ["kl", "vq", "fsq", "tc", "gan"])
def test_two_processes_equal_one(tmp_path, run_benchmark, member):
    stages = ["train-vae", "train-diffusion"] if member == "kl" else ["train-vae"]  # stage 2 is the same for all
    run_benchmark("processes", "--steps", 20, "--out", tmp_path, "--member", member, "--stages", *stages)
