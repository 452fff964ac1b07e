"""ROC-AUC and average precision against scikit-learn, and intervals against their definition and their promise."""

import math

import pytest
import torch
from scipy.optimize import brentq
from sklearn.metrics import average_precision_score, roc_auc_score

from calotype.density.ranking import average_precision, roc_auc


def example(n=200, share=0.3, shift=1.0, seed=0, ties=False):
    """Scores (n,) of which a share, the anomalies, is shifted; rounded to few values where there are to be ties."""
    generator = torch.Generator().manual_seed(seed)
    anomalous = torch.arange(n) < share * n
    scores = torch.randn(n, generator=generator, dtype=torch.float64) + shift * anomalous
    return (scores.mul(2).round() if ties else scores), anomalous


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_scikit_learn(seed, ties):
    scores, anomalous = example(seed=seed, ties=ties)
    assert roc_auc(scores, anomalous).value == pytest.approx(roc_auc_score(anomalous, scores), abs=1e-12)
    expected = average_precision_score(anomalous, scores)
    assert average_precision(scores, anomalous).value == pytest.approx(expected, abs=1e-12)


def test_the_ends_of_the_auc_lie_as_far_as_their_own_standard_error_reaches():
    scores, anomalous = example()
    found, m, n = roc_auc(scores, anomalous), int(anomalous.sum()), int((~anomalous).sum())

    def gap(t):
        q1, q2, more = t / (2 - t), 2 * t * t / (1 + t), (m + n) / 2 - 1  # Hanley & McNeil 1982, Newcombe 2006
        variance = (t * (1 - t) + more * (q1 - t * t) + more * (q2 - t * t)) / (m * n)
        return abs(t - found.value) - 1.959964 * math.sqrt(variance)

    assert found.low == pytest.approx(brentq(gap, 1e-9, found.value), abs=1e-6)
    assert found.high == pytest.approx(brentq(gap, found.value, 1 - 1e-9), abs=1e-6)


def test_ninety_five_of_a_hundred_intervals_of_the_auc_hold_the_truth():
    truth = 0.5 * (1 + math.erf(1.5 / 2))  # of two normal laws 1.5 deviations apart
    found = [roc_auc(*example(n=60, share=0.5, shift=1.5, seed=seed)) for seed in range(400)]
    assert 0.92 < sum(low < truth < high for _, low, high in found) / 400 < 0.985


def test_a_perfect_order_of_few_pictures_is_not_taken_for_certain():
    few, many = (roc_auc(torch.arange(2.0 * n), torch.arange(2 * n) >= n) for n in (5, 500))
    assert (few.value, few.high, many.value) == (1, 1, 1)
    assert few.low < 0.75 < 0.99 < many.low < 1


def test_bootstrap_of_the_precision_is_repeatable_and_as_wide_as_fresh_samples_vary():
    scores, anomalous = example(n=400)
    found = average_precision(scores, anomalous)
    assert found == average_precision(scores, anomalous) != average_precision(scores, anomalous, seed=1)
    fresh = torch.tensor([average_precision(*example(n=400, seed=seed)).value for seed in range(1, 30)])
    assert found.high - found.low == pytest.approx(3.92 * float(fresh.std()), rel=0.5)
    assert found.low < found.value < found.high
