"""The nearest normal pictures by their codes, with bounded memory."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calotype.data import Pictures, evenly_spaced

K = 3  # neighbours that are shown; the distance to the last of them is the score
MOST = 10_000  # codes that are kept
_BYTES = 2**26  # of all thumbnails
_FLOOR = 1e-3  # of the mean variance, to which directions that hardly vary are raised
_AT_ONCE = 8_000_000  # distances


class Neighbours(NamedTuple):
    """Codes (N, d) of normal pictures, whitened, and what whitens others: their mean (d,) and a matrix (d, d)."""

    codes: Tensor
    mean: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, codes: Tensor) -> "Neighbours":
        """Those of codes (N, d): distances are Mahalanobis's (1936), so that a direction of little spread counts."""
        codes = codes.double()
        mean = codes.mean(0)
        covariance = (codes - mean).T @ (codes - mean) / max(len(codes) - 1, 1)
        variances, directions = torch.linalg.eigh(covariance)
        floor = max(_FLOOR * float(variances.mean()), 1e-12)
        matrix = directions / variances.clamp_min(floor).sqrt()
        return cls(((codes - mean) @ matrix).float(), mean, matrix)

    def nearest(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Distance (B,) to the K-th nearest of codes (B, d), and the numbers (B, K) of the K, nearest first."""
        white = ((codes.double() - self.mean) @ self.matrix).float()
        step = max(1, _AT_ONCE // len(self.codes))
        k = min(K, len(self.codes))
        parts = [torch.cdist(part, self.codes).topk(k, largest=False) for part in white.split(step)]
        numbers = torch.cat([part.indices for part in parts])
        distance = torch.cat([part.values[:, -1] for part in parts]).double()
        return distance, F.pad(numbers, (0, K - k), mode="replicate") if k < K else numbers


def thumbnails(pictures: Pictures, items: list[int]) -> Tensor:
    """The pictures with these numbers, uint8 (N, C, h, w), as large as they are or as the memory for all allows."""
    height, width = pictures.size
    shrink = math.sqrt(len(items) * pictures.sheet.channels * height * width / _BYTES)
    if shrink <= 1:
        return torch.stack([pictures[i] for i in items])
    size = [max(8, int(side / shrink)) for side in (height, width)]
    return torch.stack([_shrunk(pictures[i], size) for i in items])


def _shrunk(x: Tensor, size: list[int]) -> Tensor:
    small = F.interpolate(x[None].float(), size, mode="bilinear", antialias=True, align_corners=False)
    return small[0].round().clamp(0, 255).to(torch.uint8)


def some(count: int) -> list[int]:
    """The numbers of the training pictures that are kept."""
    return evenly_spaced(count, MOST)
