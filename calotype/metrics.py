"""Figures of merit."""

import torch
from torch import Tensor


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in decibels of pictures (B, C, H, W) in [-1, 1]."""
    mse = (x_hat - x).square().flatten(1).mean(1).clamp_min(1e-12)
    return 10 * torch.log10(4 / mse)
