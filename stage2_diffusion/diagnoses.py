"""What ails a diffusion model: latents of a strange scale before it begins, and no learning or over-fitting on the way.

Each is one sentence with a way out, said when it first shows.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calotype.data import evenly_spaced
from calotype.errors import UserError
from calotype.latents import LatentCache
from calotype.stage2_diffusion.denoiser import Prediction
from calotype.stage2_diffusion.objectives import Objective

_SETTLED = 0.2  # of the run: before that nothing is what it will be
_YOUNG = 50  # steps, in a run that is very short
_STD_RANGE = (0.1, 10.0)
_LOOKED_AT = 1024  # latents
_UNLEARNT = 0.9  # of the error of a network that always answers zero
_RISE = 1.1  # of the best held-out error


def refuse_strange_latents(cache: LatentCache, folder: Path) -> None:
    """Raise UserError if the latents are not finite, or their deviation is far from the noise's, which is 1."""
    z = cache.gather(np.array(evenly_spaced(len(cache), _LOOKED_AT)), "mean")
    if not bool(z.isfinite().all()):
        raise UserError(f"--latents {folder} holds latents that are not finite; run `calotype encode` again, --fresh.")
    std = z.double().var((0, 2, 3), correction=0).mean().sqrt().item()
    if not _STD_RANGE[0] <= std <= _STD_RANGE[1]:
        raise UserError(
            f"--latents {folder}: the standard deviation of the latents is {std:.3g} and not near 1, the noise's; let "
            "`calotype train-vae SOURCE --init VAE --steps 0` fold their scale into the autoencoder, and encode again."
        )


class Diagnoses:
    """What has been said and the best error; `state` is JSON, so that a resumed run does not repeat itself."""

    def __init__(self, error_of_zero: Callable[[], float]):
        self.error_of_zero = error_of_zero
        self.state: dict[str, Any] = {"active": [], "best": None}

    def of(self, figures: dict[str, float], step: int, progress: float) -> tuple[str, ...]:
        """The sentences about these figures that did not hold at the last validation; `progress` in [0, 1]."""
        loss, best = figures["loss"], self.state["best"]
        self.state["best"] = loss if best is None else min(loss, best)
        if progress < _SETTLED or step < _YOUNG:
            return ()
        found = {}
        if not loss < _UNLEARNT * self.error_of_zero():
            found["unlearnt"] = self._unlearnt(loss)
        elif best is not None and loss > _RISE * best:
            found["over-fitting"] = (
                f"Over-fitting: the held-out error is {loss:.4g}, {loss / best - 1:.0%} above its best of {best:.4g}; "
                "add pictures or --flip, lower --width, or stop earlier."
            )
        new = tuple(text for name, text in found.items() if name not in self.state["active"])
        self.state["active"] = list(found)
        return new

    def _unlearnt(self, loss: float) -> str:
        return (
            f"The network has learnt hardly anything: its held-out error is {loss:.4g}, and answering zero makes "
            f"{self.error_of_zero():.4g}; raise --lr if the loss falls slowly, lower it if the loss swings."
        )


def error_of_zero(objective: Objective, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
    """The mean error of a network that always answers zero, over latents and noise (B, c, h, w) and times (B,)."""
    return torch.cat([objective.errors(Zero(), z, None, eps, u) for z, eps, u in batches]).mean().item()


class Zero(nn.Module):
    """A network that always answers zero."""

    def forward(self, z_t: Tensor, t: Tensor, given: Any) -> Prediction:
        """Zeros of the shape of z_t (B, c, h, w)."""
        return Prediction(torch.zeros_like(z_t))
