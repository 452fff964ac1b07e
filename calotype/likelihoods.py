"""How likely a picture is under what the decoder says: -log p(x|z) in nats, summed over a picture's values.

A bound on the likelihood needs p(x|z), not an error. Pictures have 256 levels, a bin of width 2/255 each; a density is
integrated over the bin by Jensen's inequality (uniform dequantisation, Theis et al. 2016), in closed form. So a value
is never below the true negative log-probability of the 8-bit picture, and nats / (values * log 2) are bits per
dimension.
"""

import math

import torch
from torch import Tensor, nn

BIN = 2 / 255
_START = 0.3  # of a learnt scale: about the deviation of pictures from their mean
_LEAST = 1 / 256  # probability that the Bernoulli likelihood keeps for the other value


def gaussian(x_hat: Tensor, x: Tensor, log_scale: Tensor) -> Tensor:
    """-log p(x|z) (B,) with a normal density of mean x_hat (B, C, H, W) and standard deviation exp(log_scale)."""
    square = (x_hat - x).square() + BIN**2 / 12
    nats = 0.5 * square * torch.exp(-2 * log_scale) + log_scale + 0.5 * math.log(2 * math.pi) - math.log(BIN)
    return nats.flatten(1).sum(1)


def laplace(x_hat: Tensor, x: Tensor, log_scale: Tensor) -> Tensor:
    """-log p(x|z) (B,) with a Laplace density of median x_hat (B, C, H, W) and scale exp(log_scale)."""
    d = (x_hat - x).abs()
    distance = torch.where(d < BIN / 2, d.square() / BIN + BIN / 4, d)
    return (distance * torch.exp(-log_scale) + log_scale + math.log(2) - math.log(BIN)).flatten(1).sum(1)


def bernoulli(x_hat: Tensor, x: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """The cross-entropy (B,) of x (B, C, H, W) in [-1, 1] read as the probability of white; exact for black and white.

    A stock decoder has no sigmoid, so the probability is linear in x_hat; what lies outside [-1, 1] is pulled back by
    its distance, which only makes the value larger.
    """
    inside = x_hat.clamp(-1, 1)
    p = (1 - 2 * _LEAST) * (inside + 1) / 2 + _LEAST
    white = (x + 1) / 2
    nats = -(white * p.log() + (1 - white) * (1 - p).log()) + (x_hat - inside).abs()
    return nats.flatten(1).sum(1)


KINDS = {"gaussian": gaussian, "laplace": laplace, "bernoulli": bernoulli}


class Likelihood(nn.Module):
    """One of the likelihoods, with a scale for all values: given, or learnt with the weights (Rybkin et al. 2021)."""

    def __init__(self, kind: str, scale: float | None = None):
        super().__init__()
        self.kind = kind
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale or _START)))
        self.log_scale.requires_grad_(scale is None and kind != "bernoulli")

    @property
    def scale(self) -> float | None:
        """The scale in units of pixels in [-1, 1]; None where there is none."""
        return None if self.kind == "bernoulli" else self.log_scale.exp().item()

    def forward(self, x_hat: Tensor, x: Tensor, log_scale: Tensor) -> Tensor:
        """-log p(x|z) (B,) in nats. The scale is handed in, so that it can pass through a synchronised forward."""
        return KINDS[self.kind](x_hat, x, log_scale)
