"""What a stage must offer to the loop, and what it says about its validation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from calotype.data import Batch
from calotype.ema import PowerEma


class Review(NamedTuple):
    """What a stage makes of its validation: sentences for the person, and whether this state is worth keeping."""

    sentences: tuple[str, ...] = ()
    good: bool = False  # keep the checkpoint of this step until there is a better one
    go_back: bool = False  # to the last one that was good


class Stage(Protocol):
    """What a stage must offer; `fit` drives any."""

    name: str
    models: dict[str, nn.Module]  # as they are saved, without wrappers
    optimizers: dict[str, torch.optim.Optimizer]
    averages: dict[str, PowerEma]
    identity: dict[str, str]  # hashes of what the stage reads; a resumed run must find the same
    exports: tuple[str, ...]  # names of what export writes into the folder
    state: dict[str, dict[str, Any]]  # what else its parts must know in a resumed run, as JSON

    def batches(self, step: int) -> Iterator[Batch]:
        """Batches of this process from `step` on."""

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step; returns detached means over this process's examples, `gradient_norm` among them.

        Where the gradient is not finite no weight may change.
        """

    def backward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The gradients of that step without the step."""

    def forget(self) -> None:
        """Clear the gradients."""

    def validate(self) -> dict[str, float]:
        """Figures on held-out examples, over all processes."""

    def review(self, figures: dict[str, float], step: int, progress: float) -> Review:
        """What these figures mean; `progress` in [0, 1] is the share of the run that lies behind."""

    def preview(self) -> Image.Image:
        """A sample sheet; called in the first process only."""

    def export(self, folder: Path) -> None:
        """Write what the next stage reads; called in the first process only."""
