"""SIGKILL at random instants: the short form of the benchmark."""

import pytest


@pytest.mark.parametrize("member", ["kl", "vq", "fsq", "tc", "gan"])
def test_killed_and_repeated_ends_with_the_same_bits(tmp_path, run_benchmark, member):
    stages = ["stage1", "stage2"] if member == "kl" else ["stage1"]  # stage 2 is the same for all
    run_benchmark("kill_resume", "--kills", 2, "--out", tmp_path, "--member", member, "--stages", *stages)
