"""Where a picture is strange: its reconstruction error at each place, against what is usual there."""

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDTH = 1 / 24  # of the smoothing, in sides of the picture
_FLOOR = 1.0  # of the mean over all places: the least that counts as usual, or dark margins would outshine defects


def smooth(error: Tensor) -> Tensor:
    """Errors (B, H, W) under a Gaussian window, mirrored at the edges."""
    height, width = error.shape[1:]
    across = _window(width).to(error)
    down = _window(height).to(error)
    x = F.pad(error[:, None], [len(across) // 2] * 2 + [len(down) // 2] * 2, mode="reflect")
    return F.conv2d(F.conv2d(x, across.view(1, 1, 1, -1)), down.view(1, 1, -1, 1))[:, 0]


def usual(errors: list[Tensor]) -> Tensor:
    """The mean of smoothed errors (H, W) of normal pictures, from batches of errors (B, H, W)."""
    mean = torch.cat([smooth(batch.float()).sum(0, keepdim=True) for batch in errors]).sum(0) / sum(map(len, errors))
    return mean.clamp_min(max(_FLOOR * float(mean.mean()), 1e-8))


def strangeness(error: Tensor, usual: Tensor) -> Tensor:
    """How many times the usual error each place (B, H, W) has, of errors (B, H, W)."""
    return smooth(error.float()) / usual


def _window(side: int) -> Tensor:
    """A Gaussian window of odd length that sums to 1."""
    deviation = max(side * _WIDTH, 0.5)
    half = min(round(3 * deviation), side - 1)
    at = torch.arange(-half, half + 1)
    window = torch.exp(-0.5 * (at / deviation).square())
    return window / window.sum()
