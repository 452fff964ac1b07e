"""A running average of weights whose width is a share of the run, so that short and long runs are served alike."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

_YOUNG = 1000  # steps of which every one is taken in
_EVERY = 4  # steps of which one is taken in afterwards, for all of them


class PowerEma:
    """The power-function average of parameters (Karras et al. 2024, EDM2, eq. 123: beta_t = (1 - 1/t)^(gamma + 1)).

    The first update copies the weights, so nothing of the random start remains; after t updates the average reaches
    back over `width` * t of them. When these are many, the weights after every fourth stand for all: the product of
    four betas is that of one longer step, (1 - 4/t)^(gamma + 1), and the profile stays what it was.
    """

    def __init__(self, model: nn.Module, width: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.gamma = gamma_of_width(width)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, good: Tensor | None = None) -> None:
        """Take in the weights after optimiser step number `step` (counted from 1), unless `good` (a boolean) is false.

        A step that was left out changes no bit of the average; nobody waits for the device to know which it was.
        """
        every = _EVERY if step > _YOUNG else 1
        if step % every:
            return
        weight = 1 - (1 - every / step) ** (self.gamma + 1)
        ours, theirs = list(self.model.parameters()), list(model.parameters())
        if good is None:
            torch._foreach_lerp_(ours, theirs, weight)
        else:
            torch._foreach_lerp_(ours, theirs, [(weight * good).float()] * len(ours))
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return self.model.state_dict()


def gamma_of_width(width: float) -> float:
    """The exponent whose profile has the relative standard deviation `width` (EDM2, eq. 126)."""
    t = width**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())
