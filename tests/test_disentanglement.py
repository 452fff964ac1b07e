import math
import sys

import numpy as np
import pytest
import torch

from calotype import shapes
from calotype.errors import UserError
from calotype.randomness import numpy_generator
from calotype.stage1_vae import disentanglement as dis

N = 2000
NAMES = ("shape", "size", "place")


def world(seed=0, classes=(6, 3, 10)):
    """Independent factors (N, k)."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.integers(n, size=N) for n in classes], axis=1)


def perfect(factors):
    """A unit for each factor, at scales and with signs of their own."""
    return factors * np.array([1.0, -3.0, 0.4])[: factors.shape[1]] + 5


def noise(d=3):
    return np.random.default_rng(7).normal(size=(N, d))


def mixed(factors):
    """The perfect code, standardised and turned so that every unit holds as much of each factor."""
    code = (factors - factors.mean(0)) / factors.std(0)
    return code @ np.linalg.qr(np.vander([1.0, 2.0, 3.0]))[0] if code.shape[1] == 3 else code @ [[1, 1], [1, -1]]


def generator():
    return np.random.default_rng(3)


def needs_forests():
    pytest.importorskip("sklearn.ensemble", reason="NOT tested: DCI; pip install 'calotype[eval]'")


def test_mutual_information_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="NOT compared with scikit-learn: it is missing")
    factors = world()
    codes = np.stack([factors[:, 0] * factors[:, 1], factors[:, 2] // 3, world(1)[:, 0]], axis=1)
    expected = [[metrics.mutual_info_score(a, b) for b in factors.T] for a in codes.T]
    np.testing.assert_allclose(dis.mutual_information(codes, factors), expected, atol=1e-12)


def test_mig_is_the_gap_that_scikit_learn_and_numpy_give():
    metrics = pytest.importorskip("sklearn.metrics", reason="NOT compared with scikit-learn: it is missing")
    factors = world()
    codes = mixed(factors) @ np.diag([1, 2, 3]) + 0.3 * noise() + factors * np.array([1, 0, 0.5])
    gaps = []
    for j in range(3):
        known = []
        for unit in codes.T:
            edges = np.histogram_bin_edges(unit, 20)
            known.append(metrics.mutual_info_score(np.digitize(unit, edges[1:-1]), factors[:, j]))
        first, second = sorted(known)[:-3:-1]
        gaps.append((first - second) / metrics.mutual_info_score(factors[:, j], factors[:, j]))
    assert dis.mig(codes, factors) == pytest.approx(np.mean(gaps), abs=1e-9)
    assert 0.05 < dis.mig(codes, factors) < 0.9


def test_mig_of_two_noisy_copies_of_a_bit():
    """Units that err in a tenth and in three tenths of the cases know 1 - h(0.1) and 1 - h(0.3) bits."""
    bit = np.repeat([0, 1], 500)
    place = np.tile(np.arange(500), 2)
    codes = np.stack([bit ^ (place < 50), bit ^ (place >= 350)], axis=1).astype(float)
    h = [-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in (0.1, 0.3)]
    assert dis.mig(codes, bit[:, None]) == pytest.approx(h[1] - h[0], abs=1e-12)
    assert dis.mig(codes[:, :1], bit[:, None]) == pytest.approx(1 - h[0], abs=1e-12)


def test_a_perfect_code_scores_one():
    needs_forests()
    factors = world()
    assert set(dis.scores(perfect(factors), factors, NAMES, 0)) == {
        "mig", "factor_vae", "dci_disentanglement", "dci_completeness", "dci_informativeness",
    }  # fmt: skip
    for name, value in dis.scores(perfect(factors), factors, NAMES, 0).items():
        assert 0.95 < value <= 1, name


def test_a_mixed_code_knows_all_and_separates_nothing():
    needs_forests()
    factors = world(0, (8, 8))
    before, after = (dis.scores(code, factors, NAMES[:2], 0) for code in (perfect(factors), mixed(factors)))
    assert after["mig"] < 0.05
    assert after["factor_vae"] < 0.65 < 0.95 < before["factor_vae"]
    assert after["dci_disentanglement"] < 0.2 and after["dci_completeness"] < 0.2
    assert after["dci_informativeness"] > 0.9


def test_noise_scores_as_chance():
    needs_forests()
    factors = world()
    found = dis.scores(noise(6), factors, NAMES, 0)
    assert found["mig"] < 0.02
    assert found["factor_vae"] == pytest.approx(1 / 3, abs=0.06)
    assert found["dci_disentanglement"] < 0.1 and found["dci_completeness"] < 0.1
    assert found["dci_informativeness"] == pytest.approx(np.mean([1 / 6, 1 / 3, 1 / 10]), abs=0.04)


def test_the_factor_vae_score_of_a_code_that_misses_a_factor():
    """Two of three factors are always named; the third never: its votes fall on units that stand for the others."""
    factors = world()
    score = dis.factor_vae_score(perfect(factors)[:, :2], factors, generator(), votes=3000)
    assert score == pytest.approx(2 / 3, abs=0.03)


def test_collapsed_units_have_no_vote():
    factors = world()
    codes = perfect(factors)[:, :2]
    spread = codes.std(0).max()
    unit = (factors[:, 2:] - 4.5) / factors[:, 2].std() * spread
    alone, faint, strong = (
        dis.factor_vae_score(np.hstack([codes, *extra]), factors, generator())
        for extra in ([], [0.09 * unit], [0.5 * unit])
    )
    assert alone == faint < 0.8 < 0.95 < strong


def test_the_scale_of_a_unit_does_not_matter():
    factors = world()
    codes = (factors - factors.mean(0)) / factors.std(0) + 1.5 * noise()
    scale = np.array([1, 4, 0.5])
    one, other = (dis.factor_vae_score(c, factors, generator()) for c in (codes, codes * scale))
    assert one == other and 0.5 < one < 0.95
    assert dis.mig(codes, factors) == pytest.approx(dis.mig(codes * scale, factors))


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_code_that_does_not_vary_scores_nothing(value):
    needs_forests()
    found = dis.scores(np.full((N, 4), value), world(), NAMES, 0)
    assert found.pop("dci_informativeness") < 0.4
    assert set(found.values()) == {0.0}


def test_the_training_votes_are_not_the_test():
    """With few votes and many units a table of its own votes would name itself; a fresh one does not."""
    scores = [dis.factor_vae_score(noise(200), world(), np.random.default_rng(i), votes=100) for i in range(10)]
    assert np.mean(scores) < 0.42


def test_dci_accuracy_is_that_of_the_best_guess():
    """A unit that shows the class in 7 of 10 cases and any class else can be read right in 0.7 + 0.3 / K of them."""
    needs_forests()
    factors = world(0, (4,))
    codes = np.where(np.random.default_rng(1).random((N, 1)) < 0.7, factors, world(2, (4,))).astype(float)
    assert dis.dci(codes, factors, generator()).informativeness == pytest.approx(0.7 + 0.3 / 4, abs=0.04)


def test_disentanglement_and_completeness_differ_where_a_factor_has_two_units():
    """Each of four units serves one factor, but each factor is spread over two: exact copies share its forest."""
    needs_forests()
    factors = world(0, (8, 8))
    fine, coarse = factors % 4, factors // 4 * 4
    found = dis.dci(np.hstack([fine, coarse]), factors, generator())
    assert found.disentanglement > 0.97 and found.informativeness > 0.99
    assert 0.35 < found.completeness < 0.7


def test_purity_in_closed_form():
    assert dis.purity(np.eye(3)) == pytest.approx(1)
    assert dis.purity(np.ones((4, 3))) == pytest.approx(0)
    assert dis.purity(np.zeros((4, 3))) == 0
    stats = pytest.importorskip("scipy.stats", reason="NOT compared with scipy: it is missing")
    table = np.array([[3.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    pure = [1 - stats.entropy(row, base=3) for row in table[:2]]
    assert dis.purity(table) == pytest.approx((4 * pure[0] + 1 * pure[1]) / 5)


def test_the_order_of_the_units_does_not_matter():
    needs_forests()
    factors = world()
    codes = perfect(factors) + 0.8 * noise()
    one, other = (dis.scores(c, factors, NAMES, 0) for c in (codes, codes[:, [2, 0, 1]]))
    assert one["mig"] == pytest.approx(other["mig"], abs=1e-12) and one["factor_vae"] == other["factor_vae"]
    assert one == pytest.approx(other, abs=0.03)


def test_the_seed_decides_and_nothing_else():
    needs_forests()
    factors = world()
    codes = perfect(factors) + 2 * noise()
    np.random.seed(1)
    first = dis.scores(codes, factors, NAMES, 5)
    state = np.random.get_state()[1].copy()
    np.random.seed(2)
    assert dis.scores(torch.from_numpy(codes), factors + 3, NAMES, 5) == first
    assert dis.scores(codes, factors, NAMES, 6) != first
    np.random.seed(1)
    assert (np.random.get_state()[1] == state).all()


def test_bins_of_a_continuous_factor_hold_as_many_each():
    ids = dis.binned(np.random.default_rng(0).exponential(size=1000))
    assert np.bincount(ids).tolist() == [100] * 10
    assert dis.binned(np.array([3.0, 1.0, 2.0, 4.0]), 2).tolist() == [1, 0, 0, 1]


def test_mean_and_deviation_over_runs():
    found = dis.mean_sd([{"mig": 0.1}, {"mig": 0.2}, {"mig": 0.6}])
    assert found["mig"] == pytest.approx((0.3, np.std([0.1, 0.2, 0.6], ddof=1)))
    mean, deviation = dis.mean_sd([{"mig": 0.1}])["mig"]
    assert mean == 0.1 and math.isnan(deviation)


def test_the_factors_of_shapes_are_those_that_were_drawn():
    numbers = range(40, 340)
    ids, names = dis.shape_factors(3, numbers, shapes.FULL)
    assert names == ("shape", "colour", "size", "background", "x", "y", "rotation")
    drawn = [shapes.draw_factors(3, i, shapes.FULL) for i in numbers]
    for column, name in zip(ids.T[:4], names):
        pairs = {(i, getattr(factors, name)) for i, factors in zip(column, drawn)}
        assert len(pairs) == len(set(column)) == len({value for _, value in pairs}) > 2
    for column, name in zip(ids.T[4:], names[4:]):
        by_value = np.argsort([getattr(factors, name) for factors in drawn])
        assert np.bincount(column).tolist() == [30] * 10 and (np.diff(column[by_value]) >= 0).all()


def test_shape_factors_that_do_not_vary_are_left_out():
    still = shapes.Variation(("medium",), ("white", "sand"), jitter=0, rotation=0)
    ids, names = dis.shape_factors(0, range(96), still)
    assert names == ("shape", "colour", "background") and ids.shape == (96, 3)
    with pytest.raises(UserError, match="give more pictures"):
        dis.shape_factors(0, [5], shapes.FULL)


def test_a_factor_with_one_value_is_named():
    factors = world()
    factors[:, 1] = 2
    with pytest.raises(UserError, match="Factor size has the value 2 throughout"):
        dis.scores(perfect(factors), factors, NAMES, 0)
    assert dis.mig(perfect(factors), factors) == pytest.approx(dis.mig(perfect(factors), factors[:, [0, 2]]))


def test_codes_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="diverged"):
        dis.mig(np.full((N, 2), np.nan), world())


def test_without_scikit_learn_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(UserError, match=r"needs scikit-learn; pip install 'calotype\[eval\]'"):
        dis.dci(noise(), world(), numpy_generator(0, "dci"))
