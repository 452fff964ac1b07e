"""Figures of merit."""

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from calotype.errors import UserError

_WINDOW, _SIGMA = 11, 1.5  # pixels, as in Wang et al. 2004
_ROWS = 1024  # of a kernel matrix at a time, so that memory grows with n and not with its square


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in decibels of pictures (B, C, H, W) in [-1, 1]."""
    mse = (x_hat - x).square().flatten(1).mean(1).clamp_min(1e-12)
    return 10 * torch.log10(4 / mse)


def ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Structural similarity (B,), 1 at best, of pictures (B, C, H, W) in [-1, 1] (Wang et al. 2004).

    The mean over channels and over all places where the Gaussian window (11x11, sigma 1.5) fits whole, as in the
    authors' program; nothing is padded. Where a side is shorter than 11, the window is the largest odd one that fits.
    Luminance is counted from black, as the paper has it; about a grey of 0 the ratio of two means would be wild.
    """
    x_hat, x = x_hat.float(), x.float()
    window = _gaussian(min(_WINDOW, *x.shape[2:]))
    mu, mu_hat = _blur(x, window), _blur(x_hat, window)
    variances = _blur(x * x, window) - mu**2 + _blur(x_hat * x_hat, window) - mu_hat**2
    covariance = _blur(x * x_hat, window) - mu * mu_hat
    c1, c2 = 0.02**2, 0.06**2  # 1 % and 3 % of the range of 2
    light, light_hat = mu + 1, mu_hat + 1
    luminance = (2 * light * light_hat + c1) / (light**2 + light_hat**2 + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).flatten(1).mean(1)


def _gaussian(side: int) -> list[float]:
    """Weights that sum to 1, as many as the largest odd number up to `side`."""
    reach = (side - 1) // 2
    weights = torch.exp(-(torch.arange(-reach, reach + 1).double() ** 2) / (2 * _SIGMA**2))
    return (weights / weights.sum()).tolist()


def _blur(x: Tensor, window: list[float]) -> Tensor:
    """Weighted means of (B, C, H, W) along both sides, where the window fits."""
    for dim in (2, 3):
        # Not a convolution: autocast and TF32 round its operands, and a variance is a small difference of means.
        length = x.shape[dim] - len(window) + 1
        x = sum(weight * x.narrow(dim, i, length) for i, weight in enumerate(window))
    return x


class Moments:
    """Mean and covariance of features, in double precision; `total` (d + 1, d + 1) can be added over processes.

    `total` sums the outer products of (1, f) with itself, so it holds count, sums and products. Add it in double
    precision: the covariance is a difference.
    """

    def __init__(self, features: int):
        self.total = torch.zeros(features + 1, features + 1, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in features (n, d)."""
        rows = features.detach().cpu().double()  # some devices know no double precision
        rows = torch.cat([rows.new_ones(len(rows), 1), rows], dim=1)
        self.total += rows.T @ rows

    @property
    def count(self) -> int:
        """How many rows were added."""
        return int(self.total[0, 0])

    @property
    def mean(self) -> Tensor:
        """Mean (d,)."""
        return self.total[0, 1:] / self.count

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance (d, d)."""
        _refuse_few(self.count)
        return (self.total[1:, 1:] - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def moments(features: Tensor) -> Moments:
    """The moments of features (n, d)."""
    found = Moments(features.shape[1])
    found.add(features)
    return found


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of Gaussians with these moments, in squared units of the features (Heusel et al. 2017).

    |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A B)^1/2. The last trace is the sum of the singular values of A^1/2 B^1/2:
    symmetric roots stay real and exact where fewer samples than features leave A or B singular.
    """
    root = torch.linalg.svdvals(_root(a.cov) @ _root(b.cov)).sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * root
    return max(distance.item(), 0.0)  # rounding may leave a little below


def _root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix (d, d)."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


class Interval(NamedTuple):
    """An estimate between the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def kernel_distance(f: Tensor, g: Tensor) -> float:
    """Unbiased squared MMD of features (m, d) and (n, d) under the kernel (x·y / d + 1)^3 (Binkowski et al. 2018).

    Zero in expectation for two samples of one distribution, hence at times below zero. All pairs count, no subsets.
    """
    _refuse_few(min(len(f), len(g)))
    return _Pairs(f, g).distance


def kernel_interval(f: Tensor, g: Tensor, level: float = 0.95) -> Interval:
    """The kernel distance with a confidence interval for what infinitely many pictures on both sides would give.

    The variance is the jackknife's over the rows of both samples (Arvesen 1969); it needs no resampling, since what is
    left without a row follows from the kernel's sums over its pairs. Where both distributions are the same it comes out
    about twice too large, so the interval is then on the safe side.
    """
    _refuse_few(min(len(f), len(g)), 3)
    pairs = _Pairs(f, g)
    reach = NormalDist().inv_cdf((1 + level) / 2) * pairs.variance**0.5
    return Interval(pairs.distance, pairs.distance - reach, pairs.distance + reach)


class _Pairs:
    """Sums of the kernel over the pairs that each row of (m, d) and (n, d) takes part in."""

    def __init__(self, f: Tensor, g: Tensor):
        f, g = f.detach().cpu().double(), g.detach().cpu().double()
        self.within = _kernel(f, f) - _diagonal(f), _kernel(g, g) - _diagonal(g)
        self.across = _kernel(f, g), _kernel(g, f)

    @property
    def distance(self) -> float:
        """The unbiased estimate."""
        means = [own.sum() / (len(own) * (len(own) - 1)) for own in self.within]
        m, n = map(len, self.within)
        return (means[0] + means[1] - 2 * self.across[0].sum() / (m * n)).item()

    @property
    def variance(self) -> float:
        """The jackknife's variance of the estimate, the sum over both samples."""
        counts = [len(own) for own in self.within]
        return sum(
            _jackknife(own, across, other)
            for own, across, other in zip(self.within, self.across, reversed(counts), strict=True)
        )


def _jackknife(within: Tensor, across: Tensor, other: int) -> float:
    """Variance over leaving out one row, given the sums (n,) of its pairs within and across the samples."""
    n = len(within)
    left = (within.sum() - 2 * within) / ((n - 1) * (n - 2)) - 2 * (across.sum() - across) / ((n - 1) * other)
    return ((n - 1) * left.var(correction=0)).item()


def _diagonal(f: Tensor) -> Tensor:
    return (f.square().mean(1) + 1) ** 3


def _kernel(f: Tensor, g: Tensor) -> Tensor:
    """Sums (m,) of the kernel of each row of f (m, d) with all of g (n, d)."""
    return torch.cat([((part @ g.T / f.shape[1] + 1) ** 3).sum(1) for part in f.split(_ROWS)])


def _refuse_few(count: int, least: int = 2) -> None:
    if count < least:
        raise UserError(f"{count} samples have no covariance; compare {least} pictures or more.")
