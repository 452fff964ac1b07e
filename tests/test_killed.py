"""SIGKILL at random instants: the short form of the benchmark."""

import pytest

from benchmarks.tiny import MEMBERS


@pytest.mark.parametrize("member", MEMBERS)
def test_stage_1_killed_and_repeated_ends_with_the_same_bits(tmp_path, run_benchmark, member):
    run_benchmark("kill_resume", "--kills", 2, "--out", tmp_path, "--member", member, "--stages", "stage1")


@pytest.mark.parametrize("condition", ["class", "text", "inpaint", "options", "muon"])  # the rest is as inpaint
def test_stage_2_killed_and_repeated_ends_with_the_same_bits(tmp_path, run_benchmark, condition):
    run_benchmark("kill_resume", "--kills", 2, "--out", tmp_path, "--condition", condition, "--stages", "stage2")
