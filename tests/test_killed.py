"""SIGKILL at random instants: the short form of the benchmark."""

import pytest

SLOW = {"kl", "fsq", "vqgan", "class", "muon"}  # what is left is made of more parts; `pytest -m slow` runs these too
OTHERS = ["vq", "fsq", "tc", "text", "inpaint", "options", "muon"]  # each with something of its own to keep equal


def mostly(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def test_killed_and_repeated_ends_with_the_same_bits(tmp_path, run_benchmark):
    run_benchmark("kill_resume", "--kills", 1, "--out", tmp_path, "--subjects", "vqgan", "cache", "class")


@pytest.mark.reliability
def test_killed_often_and_also_while_saving(tmp_path, run_benchmark, sized):
    """Four subjects: KL, VQ with a discriminator, the latent cache, a UNet with its average."""
    run_benchmark("kill_resume", "--kills", sized(5, 50), "--out", tmp_path)


@pytest.mark.reliability
def test_every_other_member_and_condition(tmp_path, run_benchmark, sized):
    kills = sized(0, 6)
    if not kills:
        pytest.skip("with --nightly")
    run_benchmark("kill_resume", "--kills", kills, "--out", tmp_path, "--subjects", *OTHERS)
