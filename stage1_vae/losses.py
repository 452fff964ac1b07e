"""Reconstruction losses, one value for each example."""

from torch import Tensor


def l1(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error (B,) of pictures (B, C, H, W) in [-1, 1]."""
    return (x_hat - x).abs().flatten(1).mean(1)


def mse(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean squared error (B,) of pictures (B, C, H, W) in [-1, 1]."""
    return (x_hat - x).square().flatten(1).mean(1)


RECONSTRUCTION = {"l1": l1, "mse": mse}
