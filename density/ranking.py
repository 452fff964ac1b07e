"""How well scores rank anomalies above normal pictures: ROC-AUC and average precision, with 95 % intervals."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calotype.randomness import numpy_generator

_Z = 1.959963984540054  # of a 95 % interval
_BOOTSTRAPS = 400


class Estimate(NamedTuple):
    """A figure and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def roc_auc(scores: Tensor, anomalous: Tensor) -> Estimate:
    """The chance that an anomaly has a higher score than a normal picture, ties counting half; scores, bool (N,).

    The interval is Newcombe's (2006, method 5): the ends are those values whose own standard error, by Hanley & McNeil
    (1982), reaches to the figure. So it is honest where the figure is 1, as the usual one is not.
    """
    positive, total = int(anomalous.sum()), len(scores)
    value = _auc(scores, anomalous)
    error = _standard_error(positive, total - positive)
    return Estimate(value, _end(value, 0.0, error), _end(value, 1.0, error))


def average_precision(scores: Tensor, anomalous: Tensor, seed: int = 0) -> Estimate:
    """The mean precision at each anomaly, ties taken together; its level without skill is the share of anomalies.

    The interval holds 95 % of bootstrap samples of normal and of anomalous pictures.
    """
    order = scores.argsort(descending=True, stable=True)
    hits, ends = anomalous[order].double(), _ends_of_ties(scores[order])
    generator = numpy_generator(seed, "average precision", len(scores))
    drawn = [_precision(hits, _drawn(hits, generator), ends) for _ in range(_BOOTSTRAPS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(_precision(hits, torch.ones_like(hits), ends), float(low), float(high))


def _auc(scores: Tensor, anomalous: Tensor) -> float:
    """The statistic of Mann and Whitney, by ranks."""
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    middle = counts.cumsum(0).double() - (counts.double() - 1) / 2
    positive = int(anomalous.sum())
    above = middle[inverse][anomalous].sum().item() - positive * (positive + 1) / 2
    return above / (positive * (len(scores) - positive))


def _standard_error(positive: int, negative: int) -> Callable[[float], float]:
    """That of a ROC-AUC whose true value is `t`; of Hanley & McNeil, with both numbers replaced by their mean."""
    more = (positive + negative) / 2 - 1

    def error(t: float) -> float:
        return math.sqrt(t * (1 - t) * (1 + more * ((1 - t) / (2 - t) + t / (1 + t))) / (positive * negative))

    return error


def _end(value: float, limit: float, error: Callable[[float], float]) -> float:
    """The value on the way to `limit` from which the figure is as far as a 95 % interval reaches, by bisection."""
    near, far = value, limit
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (middle, far) if abs(middle - value) < _Z * error(middle) else (near, middle)
    return near


def _ends_of_ties(ranked: Tensor) -> Tensor:
    """For ranked scores (N,) the last place with the same score."""
    counts = ranked.unique_consecutive(return_counts=True)[1]
    return (counts.cumsum(0) - 1).repeat_interleave(counts)


def _drawn(hits: Tensor, generator: np.random.Generator) -> Tensor:
    """How often each ranked picture (N,) is drawn with replacement, among its own kind."""
    times = torch.zeros_like(hits)
    for kind in (0, 1):
        where = torch.nonzero(hits == kind)[:, 0]
        drawn = torch.from_numpy(generator.integers(0, len(where), len(where)))
        times[where] = torch.bincount(drawn, minlength=len(where)).double()
    return times


def _precision(hits: Tensor, times: Tensor, ends: Tensor) -> float:
    """Average precision of ranked pictures (N,) of which each counts so many times."""
    weight = hits * times
    precision = weight.cumsum(0)[ends] / times.cumsum(0)[ends].clamp_min(1)
    return (weight * precision).sum().item() / weight.sum().item()
