"""How far two sets of features overlap: fidelity (precision, density) and diversity (recall, coverage) apart.

The manifold of a set is the union of balls about its features, each out to the k-th nearest neighbour in its own set.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from calotype.errors import UserError

PRECISION_K, DENSITY_K = 3, 5  # as in the papers
_ROWS = 1024  # of a distance matrix at a time, so that memory grows with n and not with its square


class Overlap(NamedTuple):
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

    precision: float
    recall: float
    density: float
    coverage: float


def overlap(real: Tensor, made: Tensor, k: int = PRECISION_K, density_k: int = DENSITY_K) -> Overlap:
    """Of features (m, d) and (n, d): all shares in [0, 1], but density, which may exceed 1.

    Precision is the share of made features on the manifold of the real ones, recall the other way round. Density counts
    in how many real balls a made feature lies, over k; coverage is the share of real balls that hold a made feature.
    Raises UserError where a set has no k-th neighbour.
    """
    real, made = real.detach().cpu().double(), made.detach().cpu().double()
    made_in_real, _ = balls(made, real, radii(real, k))
    real_in_made, _ = balls(real, made, radii(made, k))
    counts, held = balls(made, real, radii(real, density_k))
    return Overlap(
        precision=_share(made_in_real),
        recall=_share(real_in_made),
        density=counts.double().mean().item() / density_k,
        coverage=_share(held),
    )


def radii(f: Tensor, k: int) -> Tensor:
    """Squared distance (n,) of each feature (n, d) to the k-th nearest of the others."""
    if len(f) <= k:
        raise UserError(f"{len(f)} pictures have no neighbours enough; compare {k + 1} pictures or more.")
    found = []
    for start in range(0, len(f), _ROWS):
        distances = squared_distances(f[start : start + _ROWS], f)
        rows = torch.arange(len(distances))
        distances[rows, start + rows] = torch.inf  # itself
        found.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(found)


def balls(f: Tensor, centres: Tensor, squared_radii: Tensor) -> tuple[Tensor, Tensor]:
    """In how many balls each feature lies (n,), and how many features each ball holds (m,)."""
    inside, held = [], torch.zeros(len(centres), dtype=torch.int64)
    for part in f.split(_ROWS):
        hits = squared_distances(part, centres) <= squared_radii
        inside.append(hits.sum(1))
        held += hits.sum(0)
    return torch.cat(inside), held


def nearest(f: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance (n,) and number (n,) of the nearest of `others` (m, d) to each feature (n, d)."""
    f, others = f.detach().cpu().double(), others.detach().cpu().double()
    found = [squared_distances(part, others).min(dim=1) for part in f.split(_ROWS)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def nearest_other(f: Tensor, rows: Tensor) -> Tensor:
    """Squared distance (n,) of some rows (n,) of features (m, d) to the nearest of the other rows."""
    f, found = f.detach().cpu().double(), []
    for part in rows.split(_ROWS):
        distances = squared_distances(f[part], f)
        distances[torch.arange(len(part)), part] = torch.inf  # itself
        found.append(distances.min(1).values)
    return torch.cat(found)


def squared_distances(f: Tensor, g: Tensor) -> Tensor:
    """Squared Euclidean distances (n, m); in double precision, because they are differences of large numbers."""
    assert f.dtype == torch.float64
    return (f.square().sum(1, keepdim=True) + g.square().sum(1) - 2 * f @ g.T).clamp_min(0)


def _share(counts: Tensor) -> float:
    return (counts > 0).double().mean().item()
