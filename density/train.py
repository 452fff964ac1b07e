"""Train a normalizing flow of cached latents, or of pictures. `calotype train-flow`, or torchrun as for stage 1."""

import sys
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from calotype import device, loop
from calotype.autoencoder import Vae, find_autoencoder, load_autoencoder
from calotype.data import Batch, micro_batches, share_of
from calotype.density.config import FlowSettings
from calotype.density.examples import Examples, Latents, Pixels
from calotype.density.flows import DEPTH, FlowFacts, bits_per_dim, build, log_normal, save_flow
from calotype.density.vectors import probes_from
from calotype.ema import PowerEma
from calotype.errors import UserError
from calotype.images import SHEET, denormalize, image_grid, sheet_labels
from calotype.memory import backward_that_fits
from calotype.randomness import key, normal
from calotype.ranks import refuse_differences
from calotype.stage import Review

_FIRST = 1024  # examples that it is standardised by
_VALIDATED, _AT_ONCE = 512, 64


class FlowStage:
    """The training of a flow as the loop sees it."""

    name = "train-flow"
    exports = ("prior",)

    def __init__(self, settings: FlowSettings, examples: Examples, accelerator: Accelerator):
        self.settings, self.examples, self.accelerator = settings, examples, accelerator
        self.share = share_of(accelerator, settings.batch_size, settings.micro_batches)
        self.identity = examples.identity
        self.facts = self._facts()
        self.net = build(self.facts, settings.seed).to(accelerator.device)
        self._begin()
        optimizer = loop.make_optimizer(self.net, settings, settings.lr)
        self.wrapped, self.optimizer = accelerator.prepare(self.net, optimizer)
        self.models = {"flow": self.net}
        self.optimizers = {"flow": self.optimizer.optimizer}
        self.averages = {"flow": PowerEma(self.net, settings.ema_width)}
        self.averaged = self.averages["flow"].model
        self.state: dict[str, dict[str, Any]] = {"memory": {"parts": settings.micro_batches}}

    def _facts(self) -> FlowFacts:
        settings, examples = self.settings, self.examples
        if settings.condition == "class" and not examples.classes:
            raise UserError("--condition class: these pictures have no classes; give --condition none.")
        return FlowFacts(
            kind=settings.kind,
            width=settings.width,
            depth=settings.depth or DEPTH[settings.kind],
            classes=() if settings.condition == "none" else tuple(examples.classes),
            **examples.facts,
        )

    def _begin(self) -> None:
        """Standardise by the first examples, the same in every process."""
        parts = [batch for _, batch in zip(range(_FIRST // _AT_ONCE), self.examples.walk("train", _AT_ONCE))]
        z = torch.cat([self.examples.take(part, "flow/begin") for part in parts]).to(self.accelerator.device)
        labels = torch.cat([part.label for part in parts])
        counts = Counter(self.examples.labels.tolist())
        shares = [counts[k] / len(self.examples.labels) for k in range(len(self.facts.classes))]
        self.net.initialize(z, self._told(labels.to(z.device)), shares)

    def _told(self, label: Tensor) -> Tensor | None:
        return label.clamp_min(0) if self.facts.classes else None

    def batches(self, step: int) -> Iterator[Batch]:
        """Examples and labels of this process from `step` on."""
        return self.examples.batches(step, self.share, self.settings.seed)

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step on latents or pictures."""
        figures = backward_that_fits(self, batch, step)
        norm = loop.update(self.accelerator, self.wrapped, self.optimizer, self.settings.clip).detach()
        self.averages["flow"].update(self.net, step + 1, norm.isfinite())
        return figures | {"gradient_norm": norm}

    def backward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The gradients of a step, and its loss as a mean over this process's examples."""
        parts = self.state["memory"]["parts"]
        total = torch.zeros((), device=self.accelerator.device)
        for part in micro_batches(self.accelerator, self.wrapped, batch, parts):
            z = self.examples.take(part, "train").to(total.device)
            loss = self.losses(z, part).mean() / parts
            self.accelerator.backward(loss)
            total += loss.detach()
        return {"loss": total}

    def losses(self, z: Tensor, batch: Batch) -> Tensor:
        """-log p(z | y) (B,) in bits per dimension."""
        y = self._told(batch.label.to(z.device))
        if self.facts.kind != "ffjord":
            eps, ladj = self.wrapped(z, y)
        else:
            with probes_from(key(self.settings.seed, "flow/probes", batch.start)):
                eps, ladj = self.wrapped(z, y)
        return bits_per_dim(log_normal(eps) + ladj, self.facts.dimensions)

    def forget(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    # What the loop asks for now and then

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Bits per dimension of held-out examples under the averaged weights, and how far the inverse is from one."""
        total = torch.zeros(2, device=self.accelerator.device)
        error = torch.zeros((), device=total.device)
        for i, batch in enumerate(self.examples.walk("val", _AT_ONCE)):
            if i * _AT_ONCE >= _VALIDATED:
                break
            if i % self.share.world != self.share.rank:
                continue
            z = self.examples.take(batch, "validation").to(total.device)
            y = self._told(batch.label.to(z.device))
            bits = bits_per_dim(self.averaged.log_prob(z, y), self.facts.dimensions)
            total += torch.stack([bits.sum(), bits.new_tensor(len(bits))])
            error = torch.maximum(error, (self.averaged.inverse(self.averaged(z, y)[0], y) - z).abs().max())
        bits, count = self.accelerator.reduce(total, "sum").tolist()
        error = self.accelerator.gather(error[None]).max()
        return {"loss": bits / count, "inversion_error[val]": error.item()}

    def review(self, figures: dict[str, float], step: int, progress: float) -> Review:
        """A word where the inverse is none."""
        error = figures["inversion_error[val]"]
        if error < 0.01:
            return Review()
        return Review((f"the inverse of the flow is wrong by {error:.2g}; a lower --lr keeps its layers gentle",))

    @torch.no_grad()
    def preview(self) -> Image.Image:
        """Samples of the averaged weights at fixed noise, decoded; a column a class."""
        count = SHEET[0] * SHEET[1]
        labels = sheet_labels(list(self.facts.classes), count)
        y = None if labels is None else torch.tensor(labels, device=self.accelerator.device)
        eps = normal(self.settings.seed, "flow/sheet", 0, count, self.facts.shape).to(self.accelerator.device)
        x = self.examples.pictures(self.averaged.inverse(eps, y), self.vae)
        return image_grid(denormalize(x.clamp(-1, 1).cpu()), columns=SHEET[1])

    @cached_property
    def vae(self) -> Vae | None:
        """The autoencoder of the latents."""
        settings = self.settings
        if settings.latents is None:
            return None
        folder = find_autoencoder(settings.latents, settings.vae, self.facts.vae)
        vae = load_autoencoder(folder, "--vae").to(self.accelerator.device)
        device.for_drawing(vae)
        return vae

    def export(self, folder: Path) -> None:
        """Write the averaged flow with what it is a density of."""
        save_flow(self.averaged, folder / "prior")


def main(settings: FlowSettings) -> None:
    """`calotype train-flow`."""
    accelerator = device.accelerator("fp32", trackers=settings.trackers, folder=settings.out)
    examples = Latents(settings) if settings.latents else Pixels(settings)
    refuse_differences(accelerator, settings, {"the examples": examples.identity["the data"]})
    accelerator.print(f"{len(examples.labels):,} {examples.words} of shape {'x'.join(map(str, examples.shape))}.")
    loop.fit(FlowStage(settings, examples, accelerator), settings, accelerator)


if __name__ == "__main__":
    from calotype.cli import main as cli

    device.leave(lambda: cli(["train-flow", *sys.argv[1:]]))
