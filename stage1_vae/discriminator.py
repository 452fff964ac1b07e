"""A discriminator of patches (Isola et al. 2017): many small verdicts on texture, none on the whole picture."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GROUP = 8  # channels of a group of GroupNorm, at least: a batch norm would make the processes differ


class PatchDiscriminator(nn.Sequential):
    """Strided 4x4 convolutions to a map of logits, positive for real; `depth` halvings of the side."""

    def __init__(self, channels: int, width: int, depth: int):
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, depth + 1):
            before, after = width * min(2 ** (i - 1), 8), width * min(2**i, 8)
            stride = 2 if i < depth else 1
            layers += [nn.Conv2d(before, after, 4, stride, 1), nn.GroupNorm(_groups(after), after), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(after, 1, 4, 1, 1))


def _groups(channels: int) -> int:
    return next(groups for groups in range(channels // _GROUP, 0, -1) if channels % groups == 0)


def depth_for(size: tuple[int, int]) -> int:
    """Three halvings as usual, fewer where pictures of (height, width) would shrink to nothing."""
    return max(1, min(3, min(size).bit_length() - 4))


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: the mean of relu(1 - D(x)) and relu(1 + D(x_hat)), halved (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def gradient_penalty(discriminator: nn.Module, x: Tensor) -> Tensor:
    """R1: the mean squared norm of dD/dx at real pictures (B, C, H, W), D averaged over patches (Mescheder 2018)."""
    x = x.detach().requires_grad_()
    logits = discriminator(x).flatten(1).mean(1)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()
