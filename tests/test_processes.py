"""Two processes against one: the short form of the benchmark."""

import pytest

from benchmarks.tiny import MEMBERS

QUICK, CI = {"gan", "text"}, {"vq", "inpaint"}  # made of the most parts; the rest with --nightly


def all_of(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.reliability) for name in names]


def skip_unless(sized, name):
    if name not in sized(QUICK | CI, {name}):
        pytest.skip("with --nightly")


@pytest.mark.parametrize("member", all_of(MEMBERS))
def test_two_processes_of_stage_1_equal_one(tmp_path, run_benchmark, member, sized):
    skip_unless(sized, member)
    steps = sized(20, 100)
    run_benchmark("processes", "--steps", steps, "--out", tmp_path, "--member", member, "--stages", "train-vae")


@pytest.mark.parametrize("condition", all_of(["class", "text", "inpaint", "options"]))  # the rest is as inpaint
def test_two_processes_of_stage_2_equal_one(tmp_path, run_benchmark, condition, sized):
    skip_unless(sized, condition)
    stage = ["--stages", "train-diffusion"]
    run_benchmark("processes", "--steps", sized(20, 100), "--out", tmp_path, "--condition", condition, *stage)
