"""Overlap of two sets of features against torch-fidelity, brute force and what is known of squares."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from calotype import manifold
from calotype.errors import UserError
from calotype.manifold import Overlap, nearest, overlap, radii
from calotype.metrics import kernel_interval
from calotype.randomness import normal


def cloud(name, n, d=6, shift=0.0, scale=1.0):
    return scale * normal(0, name, 0, n, (d,)).double() + shift


def test_precision_and_recall_are_those_of_torch_fidelity():
    fidelity = pytest.importorskip("torch_fidelity.metric_prc", reason="NOT compared: torch-fidelity is missing")
    real, made = cloud("real", 300), cloud("made", 200, shift=0.6, scale=0.7)
    for k in (3, 5):
        kwargs = {"prc_neighborhood": k, "prc_batch_size": 77, "save_cpu_ram": False, "verbose": False}
        expected = fidelity.prc_features_to_metric(made, real, **kwargs)
        found = overlap(real, made, k=k)
        assert 0.05 < expected["recall"] < expected["precision"] < 0.99
        assert (found.precision, found.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


def test_density_and_coverage_are_those_of_a_double_loop():
    real, made, k = cloud("real", 60, 3).numpy(), cloud("made", 40, 3, shift=0.5).numpy(), 5
    between = np.linalg.norm(real[:, None] - made, axis=2)
    own = np.sort(np.linalg.norm(real[:, None] - real, axis=2), axis=1)[:, k]  # the first is the distance to itself
    inside = between <= own[:, None]
    found = overlap(torch.from_numpy(real), torch.from_numpy(made))
    assert found.density == pytest.approx(inside.sum() / (k * len(made)))
    assert found.coverage == pytest.approx(inside.any(axis=1).mean())


def test_memory_is_bounded_without_a_change(monkeypatch):
    real, made = cloud("real", 100), cloud("made", 90, shift=0.3)
    whole = overlap(real, made)
    monkeypatch.setattr(manifold, "_ROWS", 7)
    assert overlap(real, made) == pytest.approx(whole)
    assert_close(nearest(made, real)[0], torch.cdist(made, real).square().min(1).values)
    assert torch.equal(nearest(made, real)[1], torch.cdist(made, real).min(1).indices)


def test_a_lost_mode_costs_recall_and_an_invented_one_precision():
    left, right = cloud("left", 200, 2, -20), cloud("right", 200, 2, 20)
    other = cloud("other", 200, 2, -20)
    assert overlap(torch.cat([left, right]), other)[:2] == pytest.approx((1.0, 0.5), abs=0.06)
    assert overlap(left, torch.cat([other, right]))[:2] == pytest.approx((0.5, 1.0), abs=0.06)
    assert overlap(left, right) == Overlap(0.0, 0.0, 0.0, 0.0)
    assert overlap(left, left) == pytest.approx((1.0, 1.0, 1.0 + 1 / 5, 1.0), abs=0.3)


def test_the_density_of_one_distribution_is_one_and_its_coverage_known():
    """Naeem et al. 2020: E[density] = 1, E[coverage] = 1 - (1/2)^k for equally many samples (the limit of lemma 2)."""
    found = [overlap(cloud(f"r{i}", 400, 3), cloud(f"m{i}", 400, 3)) for i in range(6)]
    assert np.mean([f.density for f in found]) == pytest.approx(1, abs=0.04)
    assert np.mean([f.coverage for f in found]) == pytest.approx(1 - 0.5**5, abs=0.01)


def test_large_features_lose_no_neighbours():
    f = 1e4 + cloud("far away", 50, 4)
    expected = np.sort(np.linalg.norm(f.numpy()[:, None] - f.numpy(), axis=2), axis=1)[:, 3] ** 2
    np.testing.assert_allclose(radii(f, 3), expected, rtol=1e-4)


def test_too_few_pictures_have_no_neighbours():
    with pytest.raises(UserError, match="5 pictures .* 6 pictures or more"):
        overlap(cloud("real", 5), cloud("made", 50))


# The interval of the kernel distance


def moments_of(mean, std):
    return mean, mean**2 + std**2, mean**3 + 3 * mean * std**2


def expected_kernel(one, two, d):
    """E (x·y / d + 1)^3 for x and y with independent normal coordinates of these means and deviations."""
    product = [a * b for a, b in zip(moments_of(*one), moments_of(*two))]
    variance, third = product[1] - product[0] ** 2, product[2] - 3 * product[0] * product[1] + 2 * product[0] ** 3
    return (1 + product[0]) ** 3 + 3 * (1 + product[0]) * variance / d + third / d**2


@pytest.mark.parametrize("mean, std, level", [(0.0, 1.0, 0.95), (0.3, 1.0, 0.95), (1.0, 1.0, 0.8), (0.0, 1.5, 0.95)])
def test_the_interval_holds_the_true_kernel_distance_as_often_as_it_says(mean, std, level):
    d, real, made = 8, (0.0, 1.0), (mean, std)
    true = expected_kernel(real, real, d) + expected_kernel(made, made, d) - 2 * expected_kernel(real, made, d)
    draws = normal(0, f"interval {mean} {std}", 0, 300, (250, d)).double()
    found = [kernel_interval(x[:150], mean + std * x[150:], level) for x in draws]
    assert np.mean([f.value for f in found]) == pytest.approx(true, abs=5 * np.std([f.value for f in found]) / 300**0.5)
    held = np.mean([f.low <= true <= f.high for f in found])
    assert held >= level - 4 * (level * (1 - level) / 300) ** 0.5
    if mean:  # elsewhere the jackknife is on the safe side, or nearly so
        assert held <= level + 4 * (level * (1 - level) / 300) ** 0.5
    assert np.mean([f.high - f.low for f in found]) < 12 * np.std([f.value for f in found])


def test_the_jackknife_is_that_of_leaving_out_each_row():
    f, g = normal(0, "f", 0, 9, (3,)), normal(0, "g", 0, 12, (3,)) + 0.5
    from calotype.metrics import kernel_distance

    left = [
        [kernel_distance(torch.cat([f[:i], f[i + 1 :]]), g) for i in range(len(f))],
        [kernel_distance(f, torch.cat([g[:i], g[i + 1 :]])) for i in range(len(g))],
    ]
    std = sum((len(side) - 1) * np.var(side) for side in left) ** 0.5
    found = kernel_interval(f, g)
    assert found.value == pytest.approx(kernel_distance(f, g), rel=1e-12)
    assert (found.high - found.value, found.value - found.low) == pytest.approx((1.959964 * std,) * 2, rel=1e-6)


def test_two_pictures_have_no_interval():
    with pytest.raises(UserError, match="2 samples .* 3 pictures or more"):
        kernel_interval(torch.zeros(2, 3), normal(0, "many", 0, 5, (3,)))
