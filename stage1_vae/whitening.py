"""Codes kept white while they are learnt: what running means are to a codebook, for a grid that cannot move."""

import torch
from torch import Tensor, nn

_RIDGE = 1e-6  # of the mean variance, so that a channel that is constant does not become infinite


class Whitening(nn.Module):
    """Running mean and covariance of codes (N, c), and the linear map that takes them to mean 0, covariance std^2.

    Encoders let their channels become alike and narrow; most points of a grid would never be met. The map is no
    parameter, and at the end it is folded into the convolution before it.
    """

    decay = 0.98

    def __init__(self, channels: int, std: float):
        super().__init__()
        self.std = std
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("covariance", torch.eye(channels))
        self.register_buffer("matrix", torch.eye(channels))

    def forward(self, h: Tensor) -> Tensor:
        """Codes (B, c, h, w) made white."""
        with torch.autocast(h.device.type, enabled=False):  # neighbouring levels must not be confused by bf16
            return torch.einsum("ij,bjhw->bihw", self.matrix, h.float() - self.mean[:, None, None])

    @torch.no_grad()
    def update(self, mean: Tensor, covariance: Tensor, weight: float | Tensor) -> None:
        """Move towards the statistics (c,) and (c, c) of a batch by `weight`; 0 leaves all as it is."""
        self.mean.lerp_(mean, weight)
        self.covariance.lerp_(covariance, weight)
        ridge = _RIDGE * self.covariance.diagonal().mean() * torch.eye(len(mean), device=mean.device)
        factor, _ = torch.linalg.cholesky_ex(self.covariance + ridge)
        eye = torch.eye(len(mean), device=mean.device)
        self.matrix.copy_(self.std * torch.linalg.solve_triangular(factor, eye, upper=False))

    @torch.no_grad()
    def fold_into(self, conv: nn.Conv2d) -> None:
        """Let a 1x1 convolution give white codes by itself, and become the identity."""
        conv.weight.copy_(torch.einsum("ij,jkhw->ikhw", self.matrix, conv.weight))
        conv.bias.copy_(self.matrix @ (conv.bias - self.mean))
        self.mean.zero_()
        self.matrix.copy_(torch.eye(len(self.mean)))


def statistics(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over rows (N, c) from which mean and covariance follow: their number, sum and products (c, c)."""
    return rows.new_tensor(float(len(rows))), rows.sum(0), rows.T @ rows


def moments(count: Tensor, total: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (c,) and covariance (c, c) from the sums of `statistics`."""
    mean = total / count
    return mean, products / count - mean[:, None] * mean
