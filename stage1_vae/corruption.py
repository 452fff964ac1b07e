"""Damage to the input of a denoising autoencoder (Vincent et al. 2008); the target stays clean."""

from collections.abc import Callable

import torch
from torch import Tensor

from calotype.errors import UserError
from calotype.randomness import normal, uniform

Corruption = Callable[[Tensor, int, int, str], Tensor]


def gaussian(x: Tensor, amount: float, seed: int, start: int, purpose: str) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] plus noise of that standard deviation."""
    return x + amount * normal(seed, f"{purpose} corruption", start, len(x), tuple(x.shape[1:])).to(x)


def mask(x: Tensor, amount: float, seed: int, start: int, purpose: str) -> Tensor:
    """Pictures with that share of their pixels (all channels) set to mid grey."""
    u = uniform(seed, f"{purpose} corruption", start, len(x), (1, *x.shape[2:])).to(x)
    return x.masked_fill(u < amount, 0.0)


def salt(x: Tensor, amount: float, seed: int, start: int, purpose: str) -> Tensor:
    """Pictures with that share of their pixels set to black or white, half each."""
    u = uniform(seed, f"{purpose} corruption", start, len(x), (1, *x.shape[2:])).to(x)
    return torch.where(u < amount, torch.where(u < amount / 2, -1.0, 1.0), x)


KINDS = {"gaussian": gaussian, "mask": mask, "salt": salt}


def parse_corruption(text: str | None) -> Corruption | None:
    """`gaussian:0.3` -> a function of (x, seed, start, purpose); raises UserError."""
    if text is None:
        return None
    name, _, amount = text.partition(":")
    try:
        value = float(amount)
    except ValueError:
        value = -1.0
    if name not in KINDS or not 0 < value <= (10 if name == "gaussian" else 1):
        raise UserError(f"--corruption {text} must be gaussian:STD, mask:SHARE or salt:SHARE, such as gaussian:0.3.")
    return lambda x, seed, start, purpose: KINDS[name](x, value, seed, start, purpose)
