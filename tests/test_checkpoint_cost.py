"""What checkpoints cost: the short form of the benchmark."""

import pytest


@pytest.mark.reliability
def test_a_checkpoint_every_five_minutes_costs_two_per_cent_at_most(tmp_path, run_benchmark, sized):
    sizes = sized([0.1, 5], [0.1, 10, 100])
    run_benchmark("checkpoint_cost", "--parameters", *sizes, "--saves", sized(3, 5), "--out", tmp_path)
