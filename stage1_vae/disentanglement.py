"""How well single units of a code stand for single known factors: MIG, the FactorVAE score, DCI.

Everywhere codes are (N, d) of NumPy or torch, factors (N, k) of integer class ids; a factor of measure is `binned`
before.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calotype.errors import UserError
from calotype.randomness import numpy_generator
from calotype.shapes import Variation, draw_factors

SENTENCE = (
    "Without inductive biases in model and data, unsupervised disentanglement is impossible, and the seed often "
    "decides more than the model (Locatello et al. 2019)."
)

_TREES, _DEPTH = 50, 12
_BARELY = 0.01  # a unit whose variance is a smaller share of the largest has collapsed


def binned(values: np.ndarray, count: int = 10) -> np.ndarray:
    """Ids (N,) from 0 to count - 1 of numbers (N,), by quantiles, so that the bins hold about as many each."""
    edges = np.quantile(values, np.arange(1, count) / count)
    return np.searchsorted(edges, values, side="right")


def mutual_information(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mutual information (d, k) in nats of the columns of ids (N, d) with those of ids (N, k)."""
    pairs = [[column * (other.max() + 1) + other for other in b.T] for column in a.T]
    joint = np.array([[_entropy(ids) for ids in row] for row in pairs])
    return _entropies(a)[:, None] + _entropies(b) - joint


def mig(codes: np.ndarray | Tensor, factors: np.ndarray) -> float:
    """Mutual information gap, at most 1 (Chen et al. 2018): how far a factor's best unit is ahead of its second best.

    Units are cut into 20 bins of equal width, gaps divided by the factor's entropy and averaged over the factors. The
    second best of a code with one unit knows nothing.
    """
    codes, factors = _checked(codes, factors)
    known = mutual_information(_equal_width(codes, 20), factors)
    best = np.sort(np.vstack([np.zeros_like(known[:1]), known]), axis=0)
    return float(((best[-1] - best[-2]) / _entropies(factors)).mean())


def factor_vae_score(
    codes: np.ndarray | Tensor, factors: np.ndarray, generator: np.random.Generator, votes: int = 800
) -> float:
    """Accuracy in [0, 1] of naming the factor that a group of rows shares (Kim & Mnih 2018).

    A vote is the unit that varies least within a group, against its variance over all rows; each unit stands for the
    factor that it was voted for most in `votes` votes, and as many others are the test. Collapsed units (variance below
    1 % of the largest) have no vote; a code of which nothing varies scores 0. Chance is about 1 / k.
    """
    codes, factors = _checked(codes, factors)
    variance = np.where(np.ptp(codes, axis=0) > 0, codes.var(0), 0.0)  # rounding lets a constant vary
    active = variance > _BARELY * variance.max()
    if not active.any():
        return 0.0
    scaled = codes[:, active] / np.sqrt(variance[active])
    train, test = (_votes(scaled, factors, generator, votes) for _ in range(2))
    return float(test[np.arange(len(test)), train.argmax(1)].sum() / test.sum())


def _votes(codes: np.ndarray, factors: np.ndarray, generator: np.random.Generator, count: int) -> np.ndarray:
    """How often (d, k) unit i varied least while factor j was held, over groups of 64 rows drawn with replacement."""
    table = np.zeros((codes.shape[1], factors.shape[1]), dtype=np.int64)
    for _ in range(count):
        held = generator.integers(factors.shape[1])
        like = generator.integers(len(factors))
        alike = np.flatnonzero(factors[:, held] == factors[like, held])
        table[codes[generator.choice(alike, 64)].var(0).argmin(), held] += 1
    return table


class Dci(NamedTuple):
    """Disentanglement, completeness and informativeness, each in [0, 1] (Eastwood & Williams 2018)."""

    disentanglement: float
    completeness: float
    informativeness: float


def dci(codes: np.ndarray | Tensor, factors: np.ndarray, generator: np.random.Generator) -> Dci:
    """How few factors a unit serves, how few units a factor needs, and how often a forest names the factor's class.

    Forests of 50 trees learn each factor on a random half of the rows; accuracy is that on the other half.
    """
    codes, factors = _checked(codes, factors)
    train, test = np.array_split(generator.permutation(len(codes)), 2)
    importances, accuracies = [], []
    for column in factors.T:
        forest = _forest(generator).fit(codes[train], column[train])
        importances.append(forest.feature_importances_)
        accuracies.append(forest.score(codes[test], column[test]))
    by_factor = np.array(importances)
    return Dci(purity(by_factor.T), purity(by_factor), float(np.mean(accuracies)))


def purity(importances: np.ndarray) -> float:
    """Mean of 1 - entropy / its maximum over rows (n, m) of importances, each weighted by its sum; 0 if all are 0."""
    weights = importances.sum(1, keepdims=True)
    share = importances / np.maximum(weights, 1e-12)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(1)
    pure = 1 - entropy / math.log(max(importances.shape[1], 2))  # the only one is pure
    return float((weights[:, 0] * pure).sum() / max(weights.sum(), 1e-12))


def _forest(generator: np.random.Generator):  # -> sklearn.ensemble.RandomForestClassifier
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError as error:
        raise UserError("The DCI score needs scikit-learn; pip install 'calotype[eval]'.") from error
    return RandomForestClassifier(
        _TREES,
        max_depth=_DEPTH,
        max_features=None,  # else a split that is not shown the right unit lends importance to a wrong one
        random_state=int(generator.integers(2**31)),
    )


def scores(codes: np.ndarray | Tensor, factors: np.ndarray, names: Iterable[str], seed: int) -> dict[str, float]:
    """All scores of a code; `names` (k) say in an error which factor is at fault."""
    for name, column in zip(names, factors.T, strict=True):
        if (column == column[0]).all():
            raise UserError(f"Factor {name} has the value {column[0]} throughout; leave it out or give more pictures.")
    known = dci(codes, factors, numpy_generator(seed, "dci"))
    return {
        "mig": mig(codes, factors),
        "factor_vae": factor_vae_score(codes, factors, numpy_generator(seed, "factor_vae")),
        **{f"dci_{name}": value for name, value in known._asdict().items()},
    }


def mean_sd(runs: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and sample standard deviation of each score over runs; the deviation of a single run is nan."""
    table = {name: np.array([run[name] for run in runs]) for name in runs[0]}
    return {name: (float(v.mean()), float(v.std(ddof=1)) if len(v) > 1 else math.nan) for name, v in table.items()}


def shape_factors(seed: int, indices: Iterable[int], variation: Variation) -> tuple[np.ndarray, tuple[str, ...]]:
    """Ids (N, k) and names (k) of what varies in these pictures of the embedded data set; x, y and rotation binned.

    Turns that look alike count as different (those of a circle, a square's by 90 degrees), so no code of pictures
    reaches a MIG of 1 where rotation varies.
    """
    drawn = [draw_factors(seed, index, variation) for index in indices]
    columns = {}
    for name in ("shape", "colour", "size", "background", "x", "y", "rotation"):
        values = np.array([getattr(factors, name) for factors in drawn])
        if (values != values[0]).any():
            columns[name] = binned(values) if values.dtype.kind == "f" else np.unique(values, return_inverse=True)[1]
    return _side_by_side(list(columns.values())), tuple(columns)


def _checked(codes: np.ndarray | Tensor, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N, d) in double precision, and the ids (N, k) of the factors that vary, renumbered from 0."""
    codes = torch.as_tensor(codes).detach().cpu().double().numpy()
    factors = np.asarray(factors)
    assert factors.dtype.kind in "iu" and len(codes) == len(factors) and codes.ndim == factors.ndim == 2
    if not np.isfinite(codes).all():
        raise UserError("The codes hold nan or infinity; the autoencoder has diverged, train it with a lower --lr.")
    ids = [np.unique(column, return_inverse=True)[1] for column in factors.T]
    return codes, _side_by_side([column for column in ids if column.any()])


def _side_by_side(columns: list[np.ndarray]) -> np.ndarray:
    if not columns:
        raise UserError("No factor varies in these pictures; give more pictures.")
    return np.stack(columns, axis=1)


def _equal_width(codes: np.ndarray, count: int) -> np.ndarray:
    """Ids (N, d) from 0 to count - 1 by bins of equal width between the least and the greatest of each unit."""
    low, width = codes.min(0), np.ptp(codes, axis=0)
    place = (codes - low) / np.where(width > 0, width, 1)
    return np.minimum((place * count).astype(np.int64), count - 1)


def _entropies(ids: np.ndarray) -> np.ndarray:
    """Entropies (k,) in nats of the columns of ids (N, k)."""
    return np.array([_entropy(column) for column in ids.T])


def _entropy(ids: np.ndarray) -> float:
    share = np.unique(ids, return_counts=True)[1] / len(ids)
    return float(-(share * np.log(share)).sum())
