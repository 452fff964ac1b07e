"""Figures on held-out pictures. Each adds up sums that can be added over processes, and turns them into figures."""

import torch
from torch import Tensor


class Mean:
    """The mean of one figure over pictures."""

    def __init__(self, name: str):
        self.name, self.total = name, torch.zeros(2, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take in a value (B,) for each picture."""
        values = values.cpu().double()
        self.total += torch.stack([values.sum(), values.new_tensor(len(values))])

    def figures(self, total: Tensor) -> dict[str, float]:
        """The mean over all that `total` holds."""
        return {self.name: (total[0] / total[1]).item()}


class CodeUse:
    """Share of the codebook in use, and the perplexity of the codes (the exponential of their entropy)."""

    def __init__(self, codes: int):
        self.total = torch.zeros(codes, dtype=torch.float64)

    def add(self, numbers: Tensor) -> None:
        """Take in code numbers (B, h, w)."""
        self.total += torch.bincount(numbers.flatten().cpu(), minlength=len(self.total))

    def figures(self, total: Tensor) -> dict[str, float]:
        """Usage in [0, 1] and perplexity in [1, codes]."""
        share = total / total.sum()
        entropy = -(share * share.clamp_min(1e-30).log()).sum()
        return {"code_usage": (total > 0).double().mean().item(), "perplexity": entropy.exp().item()}


class ActiveUnits:
    """Share of the latent's elements whose posterior mean varies over the data (Burda et al. 2016: variance > 0.01).

    And the standard deviation of the latents about the mean of their channel.
    """

    threshold = 0.01

    def __init__(self, shape: tuple[int, int, int]):
        self.total = torch.zeros(3, *shape, dtype=torch.float64)  # sum, sum of squares, count

    def add(self, mean: Tensor) -> None:
        """Take in posterior means (B, c, h, w)."""
        mean = mean.cpu().double()
        self.total += torch.stack([mean.sum(0), mean.square().sum(0), torch.full_like(mean[0], len(mean))])

    def figures(self, total: Tensor) -> dict[str, float]:
        """The share in [0, 1], and the deviation."""
        mean, square = total[:2] / total[2]
        active = (square - mean**2 > self.threshold).double().mean().item()
        variance = square.mean((1, 2)) - mean.mean((1, 2)) ** 2
        return {"active_units": active, "latent_std": variance.mean().clamp_min(0).sqrt().item()}
