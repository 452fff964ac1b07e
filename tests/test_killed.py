"""SIGKILL at random instants: the short form of the benchmark."""

import pytest

from benchmarks.tiny import MEMBERS

SLOW = {"kl", "fsq", "class", "muon"}  # what is left is made of more parts; `pytest -m slow` kills these too


def mostly(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.mark.parametrize("member", mostly(MEMBERS))
def test_stage_1_killed_and_repeated_ends_with_the_same_bits(tmp_path, run_benchmark, member):
    run_benchmark("kill_resume", "--kills", 2, "--out", tmp_path, "--member", member, "--stages", "stage1")


@pytest.mark.parametrize("condition", mostly(["class", "text", "inpaint", "options", "muon"]))  # the rest is as inpaint
def test_stage_2_killed_and_repeated_ends_with_the_same_bits(tmp_path, run_benchmark, condition):
    run_benchmark("kill_resume", "--kills", 2, "--out", tmp_path, "--condition", condition, "--stages", "stage2")
