"""Edges and texture by fixed filters: what can be seen of a picture without any trained network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SCALES = 4
_LEAST_SIDE = 6  # of the coarsest scale
_EPS = 1e-3


class GradientFeatures(nn.Module):
    """Edges and texture energy at several scales, by fixed filters: nothing to fetch, nothing to train.

    At each scale of a binomial pyramid: the horizontal and vertical derivative, and the square root of their local
    energy, which stays the same when fine texture is moved by a pixel. Any number of channels.
    """

    name = "gradients"

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps (B, 3C, h, w) for each scale of pictures (B, C, H, W) in [-1, 1]."""
        maps = []
        for _ in range(_SCALES):
            dx = F.pad(x, (0, 1, 0, 0), mode="replicate").diff(dim=3)
            dy = F.pad(x, (0, 0, 0, 1), mode="replicate").diff(dim=2)
            energy = (_blur(dx.square() + dy.square()) + _EPS**2).sqrt()
            maps.append(torch.cat([dx, dy, energy], dim=1))
            if min(x.shape[2:]) < 2 * _LEAST_SIDE:
                break
            x = _blur(x)[:, :, ::2, ::2]
        return maps

    def distance(self, f: list[Tensor], g: list[Tensor]) -> Tensor:
        """Mean absolute difference (B,) of two sets of features, the scales weighted alike."""
        return torch.stack([(a - b).abs().flatten(1).mean(1) for a, b in zip(f, g, strict=True)]).mean(0)


def _blur(x: Tensor) -> Tensor:
    """The binomial filter 1 4 6 4 1 in both directions, channel by channel."""
    row = x.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")
    channels = x.shape[1]
    x = F.conv2d(x, row.reshape(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)
    return F.conv2d(x, row.reshape(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
