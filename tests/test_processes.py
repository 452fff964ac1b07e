"""Two processes against one: the short form of the benchmark."""

import pytest
from test_killed import mostly

from benchmarks.tiny import MEMBERS


@pytest.mark.parametrize("member", mostly(MEMBERS))
def test_two_processes_of_stage_1_equal_one(tmp_path, run_benchmark, member):
    run_benchmark("processes", "--steps", 20, "--out", tmp_path, "--member", member, "--stages", "train-vae")


@pytest.mark.parametrize("condition", mostly(["class", "text", "inpaint", "options"]))  # the rest is as inpaint
def test_two_processes_of_stage_2_equal_one(tmp_path, run_benchmark, condition):
    stage = ["--stages", "train-diffusion"]
    run_benchmark("processes", "--steps", 20, "--out", tmp_path, "--condition", condition, *stage)
