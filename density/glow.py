"""Glow (Kingma & Dhariwal 2018): act-norm, an invertible 1x1 convolution and an affine coupling, at several scales.

Inside, what is transformed lies channels last (B, h, w, c), which is how zuko's linear transform takes it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zuko.lazy import LazyTransform
from zuko.transforms import (
    ComposedTransform,
    CouplingTransform,
    DependentTransform,
    LULinearTransform,
    MonotonicAffineTransform,
    PermutationTransform,
)

from calotype.density.vectors import precise
from calotype.errors import UserError

_MOST_LEVELS, _LEAST_SIDE = 3, 4  # scales, and the side down to which a level halves it
_LEAST_SLOPE = 1e-3  # of zuko's affine transform, whose log-scale is squashed


class ActNorm(LazyTransform):
    """A shift and scale of each channel that give the first batch zero mean and unit variance."""

    def __init__(self, channels: int):
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.zeros(channels)) for _ in range(2))

    def forward(self, c: Tensor | None = None) -> DependentTransform:
        """The transform of (B, h, w, channels)."""
        return DependentTransform(MonotonicAffineTransform(self.shift, self.scale, _LEAST_SLOPE), 3)

    def initialize(self, x: Tensor) -> None:
        """Standardise x (B, h, w, channels)."""
        std, mean = torch.std_mean(x.flatten(0, 2), dim=0)
        log_scale = -std.clamp_min(1e-3).log()
        squash = 1 - log_scale.abs() / -math.log(_LEAST_SLOPE)
        self.scale.copy_(log_scale / squash.clamp_min(1e-2))
        self.shift.copy_(-mean * self().base.scale)


class Linear(LazyTransform):
    """An invertible matrix P L U between the channels, which begins as a rotation; on maps a 1x1 convolution.

    The last `event` dimensions are one example.
    """

    def __init__(self, channels: int, event: int):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        p, lower, upper = torch.linalg.lu(rotation)
        pivots = upper.diagonal()
        unit = (upper / pivots[:, None]).triu(1)  # zuko's U has a unit diagonal, and L the pivots
        self.register_buffer("order", p.argmax(1))
        self.lu = nn.Parameter(lower.tril() * pivots + unit)
        self.event = event

    def forward(self, c: Tensor | None = None) -> ComposedTransform:
        """The transform of (..., channels)."""
        product = LULinearTransform(self.lu if self.training else precise(self.lu))
        over = self.event - 1
        parts = product, PermutationTransform(self.order)
        return ComposedTransform(*(DependentTransform(part, over) if over else part for part in parts))


class ConvCoupling(LazyTransform):
    """Half of the channels shift and scale the others, by a small convolutional network."""

    def __init__(self, channels: int, context: int, width: int, swap: bool):
        super().__init__()
        mask = torch.arange(channels) < (channels + swap) // 2
        self.register_buffer("mask", ~mask if swap else mask)
        kept = int(self.mask.sum())
        self.first = nn.Conv2d(kept, width, 3, padding=1)
        self.context = nn.Linear(context, width, bias=False) if context else None
        self.middle = nn.Conv2d(width, width, 1)
        self.last = nn.Conv2d(width, 2 * (channels - kept), 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, c: Tensor | None = None) -> CouplingTransform:
        """The transform of (B, h, w, channels)."""
        return CouplingTransform(lambda kept: self._of(kept, c), self.mask)

    def _of(self, kept: Tensor, c: Tensor | None) -> DependentTransform:
        h = self.first(kept.permute(0, 3, 1, 2).to(self.first.weight.dtype))
        if self.context is not None:
            h = h + self.context(c)[:, :, None, None]
        h = self.last(F.silu(self.middle(F.silu(h)))).permute(0, 2, 3, 1).to(kept.dtype)
        return DependentTransform(MonotonicAffineTransform(*h.chunk(2, dim=-1), _LEAST_SLOPE), 3)


class Level(nn.Module):
    """Steps at one scale; half of the channels then leave, and the rest goes on at half the size."""

    def __init__(self, shape: tuple[int, int, int], context: int, width: int, depth: int, levels: int):
        super().__init__()
        channels, height, width_ = shape
        self.squeezes = can_halve(height, width_) or (channels == 1 and height % 2 == width_ % 2 == 0)
        if self.squeezes:
            channels, height, width_ = 4 * channels, height // 2, width_ // 2
        if channels == 1:
            raise UserError(
                f"--kind glow couples channels, of which latents of {height}x{width_} have one; give --kind nsf."
            )
        steps = (
            (ActNorm(channels), Linear(channels, 3), ConvCoupling(channels, context, width, bool(i % 2)))
            for i in range(depth)
        )
        self.steps = nn.ModuleList(layer for step in steps for layer in step)
        self.leaves = channels // 2
        last = levels <= 1 or not can_halve(height, width_)
        rest = (channels - self.leaves, height, width_)
        self.rest = None if last else Level(rest, context, width, depth, levels - 1)

    def initialize(self, x: Tensor, c: Tensor | None) -> None:
        """Let the normalising layers begin with x (B, h, w, channels)."""
        x = squeeze(x) if self.squeezes else x
        for layer in self.steps:
            if isinstance(layer, ActNorm):
                layer.initialize(x)
            x = layer(c)(x)
        if self.rest is not None:
            self.rest.initialize(x[..., self.leaves :], c)

    def forward(self, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """What becomes of x (B, h, w, channels), in its shape and with each number at its place, and log |det| (B,)."""
        x = squeeze(x) if self.squeezes else x
        total = x.new_zeros(len(x))
        for layer in self.steps:
            x, ladj = layer(c).call_and_ladj(x)
            total = total + ladj
        if self.rest is not None:
            rest, ladj = self.rest(x[..., self.leaves :], c)
            x, total = torch.cat([x[..., : self.leaves], rest], dim=-1), total + ladj
        return (unsqueeze(x) if self.squeezes else x), total

    def inverse(self, x: Tensor, c: Tensor | None) -> Tensor:
        """The way back."""
        x = squeeze(x) if self.squeezes else x
        if self.rest is not None:
            x = torch.cat([x[..., : self.leaves], self.rest.inverse(x[..., self.leaves :], c)], dim=-1)
        for layer in reversed(self.steps):
            x = layer(c).inv(x)
        return unsqueeze(x) if self.squeezes else x


class Glow(nn.Module):
    """The levels, of latents or pictures (B, c, h, w).

    Once trained, what is transformed is held in double precision where the device has it, so that the inverse is one to
    six digits; the networks of the couplings stay in single precision, and say the same both ways.
    """

    def __init__(self, shape: tuple[int, int, int], context: int, width: int, depth: int):
        super().__init__()
        self.level = Level(shape, context, width, depth, _MOST_LEVELS)

    def initialize(self, z: Tensor, context: Tensor | None) -> None:
        """Let the normalising layers begin with z."""
        self.level.initialize(z.permute(0, 2, 3, 1), context)

    def forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """eps (B, c, h, w), each number where in the picture it comes from, and the log-determinant (B,)."""
        z = z if self.training else precise(z)
        eps, ladj = self.level(z.permute(0, 2, 3, 1), context)
        return eps.permute(0, 3, 1, 2).float(), ladj.float()

    def inverse(self, eps: Tensor, context: Tensor | None) -> Tensor:
        """z (B, c, h, w)."""
        return self.level.inverse(precise(eps).permute(0, 2, 3, 1), context).permute(0, 3, 1, 2).float()


def can_halve(height: int, width: int) -> bool:
    """Whether a level makes pictures of this size half as large."""
    return height % 2 == 0 and width % 2 == 0 and min(height, width) >= _LEAST_SIDE


def squeeze(x: Tensor) -> Tensor:
    """(B, h, w, c) -> (B, h / 2, w / 2, 4 c)."""
    return F.pixel_unshuffle(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def unsqueeze(x: Tensor) -> Tensor:
    """The way back."""
    return F.pixel_shuffle(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
