"""What an inpainting model must repaint: masks made on the fly, each a function of its position."""

import torch
from torch import Tensor

from calotype.randomness import uniform

_RECTANGLES = 3
_WHOLE, _BORDER = 0.1, 0.25  # shares of masks that hide everything, or all but a window


def random_masks(seed: int, purpose: str, start: int, count: int, size: tuple[int, int]) -> Tensor:
    """Masks (count, 1, H, W) of 0 and 1 (1: repaint), for the positions from `start` on.

    One to three rectangles; or everything outside of one, as for growing a picture; or all, so that the model can draw
    from nothing.
    """
    u = uniform(seed, f"{purpose} mask", start, count, (2 + 4 * _RECTANGLES,))
    boxes = torch.stack([_rectangle(u[:, 2 + 4 * i : 6 + 4 * i], size) for i in range(_RECTANGLES)])
    wanted = 1 + (u[:, 1] * _RECTANGLES).long()
    boxes &= (torch.arange(_RECTANGLES)[:, None] < wanted)[:, :, None, None]
    inside, kind = boxes.any(0), u[:, 0, None, None]
    mask = torch.where(kind < _WHOLE + _BORDER, ~boxes[0], inside) | (kind < _WHOLE)
    return mask[:, None].float()


def _rectangle(u: Tensor, size: tuple[int, int]) -> Tensor:
    """Rectangles (B, H, W) of a fifth to two thirds of each side, for uniform numbers (B, 4)."""
    sides = []
    for place, share, length in ((u[:, 0], u[:, 1], size[0]), (u[:, 2], u[:, 3], size[1])):
        extent = (length * (0.2 + 0.47 * share)).round().clamp_min(1)
        first = (place * (length - extent + 1)).floor()
        x = torch.arange(length)
        sides.append((x >= first[:, None]) & (x < (first + extent)[:, None]))
    return sides[0][:, :, None] & sides[1][:, None, :]
