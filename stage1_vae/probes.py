"""How well labels can be read off features: nearest neighbours and a linear probe, on held-out pictures.

Both are learnt from the training pictures and scored on the held-out ones. The neighbours are the 5 nearest by
Euclidean distance between the features as they are; the probe is a logistic regression (L2, C = 1) of features
standardised over the training pictures.
"""

import warnings
from typing import NamedTuple

import numpy as np

from calotype.data import evenly_spaced

NEIGHBOURS = 5
_MOST = {"train": 20_000, "val": 10_000}  # pictures; with 10,000 the standard error is at most half a percent
_SIDE = 3072  # of the largest matrix whose eigenvectors are taken: a few seconds on two cores
_BYTES = 2**30  # of the pixels that PCA is fitted on


class Chosen(NamedTuple):
    """Pictures of a split that take part: their numbers, and their class ids (n,)."""

    numbers: list[int]
    labels: np.ndarray


Sample = dict[str, Chosen]  # by split
Features = dict[str, np.ndarray]  # by split (n, d)


class Accuracy(NamedTuple):
    """Shares of held-out pictures whose label is found, in [0, 1]."""

    neighbours: float
    linear: float


def choose(labels: dict[str, np.ndarray]) -> Sample:
    """Pictures that have a label, at most 20,000 to learn from and 10,000 held out, spread evenly."""
    sample = {}
    for split, ids in labels.items():
        labelled = np.flatnonzero(ids >= 0)
        numbers = labelled[evenly_spaced(len(labelled), _MOST[split])]
        sample[split] = Chosen(numbers.tolist(), ids[numbers])
    return sample


def obstacle(sample: Sample) -> str | None:
    """Why no accuracy can be had, with the way out where there is one; None if nothing is in the way."""
    if len(np.unique(sample["train"].labels)) < 2:
        return "the training pictures that have a label are all of one class."
    if not sample["val"].numbers:
        return "no held-out picture has a label."
    try:
        import sklearn  # noqa: F401
    except ImportError:
        return "they need scikit-learn; pip install 'calotype[eval]' and give the command again with --fresh."
    return None


def accuracy(features: Features, sample: Sample) -> Accuracy:
    """Both accuracies of features (n, d)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(features["train"])))
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a probe that has not quite converged is a probe still
        return Accuracy(*(_share_found(method, features, sample) for method in (neighbours, linear)))


def _share_found(method, features: Features, sample: Sample) -> float:
    method.fit(features["train"], sample["train"].labels)
    return float(np.mean(method.predict(features["val"]) == sample["val"].labels))


def chance(sample: Sample) -> float:
    """The accuracy of always naming the commonest class of the training pictures."""
    commonest = np.bincount(sample["train"].labels).argmax()
    return float(np.mean(sample["val"].labels == commonest))


def table(found: dict[str, tuple[int, Accuracy]], sample: Sample) -> str:
    """A line for each kind of features: how many numbers, and the accuracies."""
    lines = [
        f"Accuracy on {len(sample['val'].numbers):,} held-out pictures, learnt from "
        f"{len(sample['train'].numbers):,}; the commonest class alone {chance(sample):.3f}",
        f"  {'features':18} {'numbers':>8} {f'{NEIGHBOURS}-NN (Euclidean)':>16} {'linear probe':>13}",
    ]
    for name, (size, (neighbours, linear)) in found.items():
        lines.append(f"  {name:18} {size:8,} {neighbours:16.3f} {linear:13.3f}")
    return "\n".join(lines)


def enough_to_fit(numbers: list[int], values: int) -> list[int]:
    """Those of the pictures, of `values` pixel values each, that PCA is fitted on: all, unless it would take long."""
    most = _BYTES // (4 * values)
    if values > _SIDE:
        most = min(most, _SIDE)
    return [numbers[i] for i in evenly_spaced(len(numbers), max(most, 2))]


def principal_axes(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) of x (n, D), and at most `count` unit vectors (k, D) along which it varies most, the first first.

    They are the eigenvectors of the covariance or, where there are fewer pictures than values, come from those of the
    n x n matrix of products. Directions without variance are left out, so k may be less than min(n, D, count).
    """
    from scipy.linalg import eigh  # comes with scikit-learn; NumPy's cannot leave eigenvectors out

    mean = x.mean(0, dtype=np.float64).astype(x.dtype)
    x = x - mean
    wide = len(x) < x.shape[1]
    products = _products(x.T if wide else x)
    side = len(products)
    values, vectors = eigh(products, subset_by_index=(max(side - count, 0), side - 1), overwrite_a=True)
    values, vectors = values[::-1], vectors[:, ::-1]
    there = values > 1e-12 * values[0]  # what is less is rounding
    axes = vectors[:, there].T.astype(x.dtype)
    if wide:
        axes = (axes @ x) / np.sqrt(values[there, None]).astype(x.dtype)
    return mean, axes


def _products(x: np.ndarray) -> np.ndarray:
    """x^T x (D, D) of x (n, D), added up in double precision."""
    return sum(part.T @ part for part in (x[i : i + 1024].astype(np.float64) for i in range(0, len(x), 1024)))
