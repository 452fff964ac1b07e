"""What a calibration promises: exact rates whatever the law, both sides of typicality, one score out of many."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, gaussian_kde
from sklearn.metrics import roc_auc_score
from torch.testing import assert_close

from calotype.density.calibration import (
    Calibration,
    Combination,
    Surprise,
    Typicality,
    out_of_fold,
    p_value,
    share_interval,
    threshold,
)
from calotype.errors import UserError


def normal(n, seed=0, k=1):
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x[:, 0] if k == 1 else x


# One score


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.37, 0.9])
def test_alarms_are_exact_where_each_picture_takes_its_turn_as_the_new_one(rate):
    """Of exchangeable pictures any could be the new one: floor(rate * (n + 1)) of n + 1 raise the alarm, always."""
    x = normal(60) ** 3
    alarms = 0
    for i in range(len(x)):
        rest = torch.cat([x[:i], x[i + 1 :]]).sort().values
        alarm = float(x[i]) >= threshold(rest, rate)
        assert alarm == bool(p_value(rest, x[i : i + 1]) <= rate)
        alarms += alarm
    assert alarms == math.floor(rate * 60 + 1e-9)


def test_ties_never_raise_more_alarms_than_promised():
    x = normal(200).round()
    alarms = sum(float(x[i]) >= threshold(torch.cat([x[:i], x[i + 1 :]]).sort().values, 0.1) for i in range(200))
    assert alarms <= 20


def test_p_is_never_nought_and_counts_those_at_least_as_strange():
    p = p_value(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([9.0, 3.0, 2.0, 0.0]))
    assert_close(p, torch.tensor([1, 2, 4, 5]).double() / 5)


def test_too_few_pictures_for_a_rate_are_refused_with_the_number_that_is_needed():
    assert threshold(normal(19).sort().values, 0.05) > float(normal(19).max())
    with pytest.raises(UserError, match=r"^--false-alarms 0.05 needs 19 held-out normal .* there are 18; .*from 0.053"):
        threshold(normal(18).sort().values, 0.05)


@pytest.mark.parametrize("count", [0, 3, 50])
def test_interval_of_a_share_is_that_of_scipy(count):
    expected = binomtest(count, 50).proportion_ci(method="wilson")
    assert share_interval(count, 50) == pytest.approx((expected.low, expected.high), abs=1e-9)


# Typicality


def test_typicality_is_the_kernel_density_of_scipy():
    x, new = {"a": normal(300)}, torch.linspace(-4, 4, 9, dtype=torch.float64)
    found = Typicality(x)
    law = gaussian_kde(x["a"].numpy(), bw_method=found.width["a"] / x["a"].numpy().std(ddof=1))
    assert_close(found({"a": new}), -torch.from_numpy(law.logpdf(new.numpy())))


def test_too_likely_is_as_strange_as_too_unlikely():
    """Of 100 normal numbers the most likely point, 0, is one that none of them is near (Nalisnick et al. 2019)."""

    def log_p(x):
        return {"log p": -0.5 * x.square().sum(1)}

    typicality = Typicality(log_p(normal(500, k=100)))
    usual = typicality(log_p(normal(500, seed=1, k=100)))
    mode, far = (
        typicality(log_p(torch.zeros(1, 100))),
        typicality(log_p(2 * normal(1, seed=2, k=100)[None].view(1, -1))),
    )
    assert mode > usual.max() and far > usual.max()
    assert log_p(torch.zeros(1, 100))["log p"] > log_p(normal(500, seed=1, k=100))["log p"].max()


def test_statistics_that_never_vary_do_no_harm():
    found = Typicality({"flat": torch.zeros(50, dtype=torch.float64)})
    here, away = found({"flat": torch.tensor([0.0, 1.0], dtype=torch.float64)})
    assert torch.isfinite(here) and here < away < math.inf


# The combination


def test_surprise_goes_on_as_the_tail_falls():
    """Of an exponential law the share above s is exp(-s), far beyond the 400 numbers that are seen too."""
    quantiles = -(1 - (torch.arange(400, dtype=torch.float64) + 0.5) / 400).log()
    found = Surprise(quantiles)
    for s in (0.5, 2.0, 15.0):
        assert float(found(torch.tensor([s], dtype=torch.float64))) == pytest.approx(s, rel=0.05)
    along = found(torch.linspace(-1, 20, 500, dtype=torch.float64))
    assert (along.diff() >= 0).all()


def test_two_weak_scores_make_a_stronger_one():
    combination = Combination({"a": normal(500), "b": normal(500, seed=1)})
    new = {"a": normal(1000, seed=2), "b": normal(1000, seed=3)}
    anomalous = torch.arange(1000) >= 500
    new = {name: x + 1.2 * anomalous for name, x in new.items()}
    alone = [roc_auc_score(anomalous, x) for x in new.values()]
    assert roc_auc_score(anomalous, combination(new)) > max(alone) + 0.04


def law(n, seed):
    """Statistics and scores of n pictures, which depend on each other."""
    x = normal(n, seed, k=6)
    return {"s": x[:, 0], "t": x[:, 1] + x[:, 0], "u": x[:, 2] ** 2}, {"a": x[:, 3], "b": x[:, 0].exp() + x[:, 4]}


def test_alarms_of_what_was_fitted_are_as_many_as_promised():
    """Over 60 calibrations of 80 pictures each, with densities, tails and thresholds all from the same pictures."""
    shares = []
    for seed in range(60):
        calibration = Calibration(*law(80, seed))
        p = calibration.p(calibration.complete(*law(400, 1000 + seed)))
        shares.append([float((p[name] <= 0.1).double().mean()) for name in ("typicality", "combination")])
    expected = 8 / 81  # the largest multiple of 1 / (n + 1) that is at most 0.1
    error = np.std(shares, 0) / math.sqrt(60)
    assert np.all(np.abs(np.mean(shares, 0) - expected) < 4 * error)
    assert np.all(error < 0.006)


def test_every_picture_is_scored_by_a_fit_to_others():
    seen = []

    def fit(x):
        seen.append(set(x["a"].tolist()))
        return lambda new: (seen[-1].isdisjoint(new["a"].tolist()) and new["a"]) + 0

    x = {"a": normal(37)}
    assert_close(out_of_fold(fit, x), x["a"])
    assert len(seen) == 10 and all(len(part) >= 33 for part in seen)


def test_a_calibration_comes_back_from_its_tensors():
    calibration = Calibration(*law(50, 0))
    again = Calibration.of(calibration.tensors())
    new = law(20, 1)
    assert calibration.names == again.names == ["a", "b", "typicality", "combination"]
    for name, x in calibration.p(calibration.complete(*new)).items():
        assert_close(again.p(again.complete(*new))[name], x)
