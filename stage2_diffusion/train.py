"""Stage 2: train a diffusion model of cached latents. `calotype train-diffusion`, or torchrun as for stage 1."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from calotype import device, loop, posthoc
from calotype.autoencoder import Vae, find_autoencoder, load_autoencoder
from calotype.checkpoint import publish, weights_hash, write_text
from calotype.data import Batch, evenly_spaced, micro_batches, share_of
from calotype.ema import PowerEma
from calotype.errors import UserError
from calotype.latents import LatentBatches, LatentCache
from calotype.memory import backward_that_fits
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.randomness import normal, uniform
from calotype.ranks import refuse_differences
from calotype.sheet import Sheet, read_sheet
from calotype.stage import Review
from calotype.stage2_diffusion import conditioning, models, text
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.denoiser import Denoiser, Uncertainty
from calotype.stage2_diffusion.diagnoses import Diagnoses, error_of_zero, refuse_strange_latents
from calotype.stage2_diffusion.objectives import Objective
from calotype.stage2_diffusion.preview import Watch, sample_sheet

_VALIDATION_LATENTS = 512
_EXAMPLE_PROMPTS = 48
_BETAS = (0.9, 0.95)  # of AdamW; a second moment of 20 steps is 5 % nearer after two minutes than one of 100
_WIDEST = 0.27  # of a power-function average


class DiffusionStage:
    """Stage 2 as the loop sees it."""

    name = "train-diffusion"
    exports = ("unet", "scheduler", "text_encoder", "tokenizer", "model.json", "ema")

    def __init__(self, settings: DiffusionSettings, vae_folder: Path, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        self.share = share_of(accelerator, settings.batch_size, settings.micro_batches)
        self.cache, self.held_out = LatentCache(settings.latents, "train"), LatentCache(settings.latents, "val")
        refuse_strange_latents(self.cache, settings.latents)
        self.vae = _vae_loader(vae_folder, accelerator.device)
        self.condition = conditioning.build(settings, self.cache, self.held_out, self._sheet, self.vae)
        self.class_names = self.condition.class_names
        self.objective = Objective(settings)
        self.identity = self._identity()
        self.net = self._denoiser()
        device.for_training(self.net, self.net.unet, compiled=settings.compile)
        optimizer = loop.make_optimizer(self.net, settings, settings.lr, betas=_BETAS)
        self.wrapped, self.optimizer = accelerator.prepare(self.net, optimizer)
        self.models = {name: part for name, part in self.net.named_children() if _is_trained(part)}
        self.optimizers = {"unet": self.optimizer.optimizer}
        self.ema, self.wide = self._tracks()
        self.averages = self.ema | {f"{name}_wide": ema for name, ema in self.wide.items()}
        self.averaged = self._averaged()
        self.diagnoses = Diagnoses(lambda: self.error_of_zero)
        memory = {"parts": settings.micro_batches}
        self.state: dict[str, dict[str, Any]] = {"memory": memory, "diagnoses": self.diagnoses.state}

    def _denoiser(self) -> Denoiser:
        encoder = self.condition.text_encoder
        inputs = models.Inputs(
            shape=tuple(self.cache.index.shape),
            more_channels=self.condition.more_channels,
            classes=len(self.class_names),
            text_width=encoder.config.hidden_size if encoder else 0,
        )
        unet = models.build(self.settings, inputs)
        learnt = self.settings.weighting == "uncertainty"
        return Denoiser(unet, encoder, Uncertainty(self.settings.seed) if learnt else None)

    def _identity(self) -> dict[str, str]:
        """Hashes of what the stage reads; a frozen text encoder is no part of a checkpoint."""
        index, folder = self.cache.index, self.settings.text_encoder
        found = {
            "the autoencoder": index.vae,
            "the classes": json.dumps(self.class_names),
            "the data": index.fingerprint,
        }
        return found | ({"the text encoder": weights_hash(folder)} if folder else {})

    def _tracks(self) -> tuple[dict[str, PowerEma], dict[str, PowerEma]]:
        """Averages of what is exported, and wider ones from which, with those, any other can be made afterwards."""
        width = self.settings.ema_width
        kept = {name: part for name, part in self.models.items() if name != "uncertainty"}
        wide = {} if self.settings.no_snapshots else kept
        return (
            {name: PowerEma(part, width) for name, part in kept.items()},
            {name: PowerEma(part, min(2 * width, _WIDEST)) for name, part in wide.items()},
        )

    def _averaged(self) -> Denoiser:
        parts = {name: ema.model for name, ema in self.ema.items()}
        return Denoiser(**{"text_encoder": self.condition.text_encoder} | parts)

    def batches(self, step: int) -> Iterator[Batch]:
        """Latents and labels of this process from `step` on."""
        return LatentBatches(self.cache, self.settings.seed).from_step(step, self.share)

    # The step

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step on latents (B, c, h, w)."""
        figures = backward_that_fits(self, batch, step)
        norm = loop.update(self.accelerator, self.wrapped, self.optimizer, self.settings.clip).detach()
        for name, part in self.models.items():
            for track in (self.ema, self.wide):
                if name in track:
                    track[name].update(part, step + 1, norm.isfinite())
        return figures | {"gradient_norm": norm}

    def backward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The gradients of a step, and its loss as a mean over this process's latents."""
        parts = self.state["memory"]["parts"]
        total = torch.zeros((), device=self.accelerator.device)
        for part in micro_batches(self.accelerator, self.wrapped, batch.to(self.accelerator.device), parts):
            loss = self.losses(part).mean() / parts
            self.accelerator.backward(loss)
            total += loss.detach()
        return {"loss": total}

    def losses(self, batch: Batch) -> Tensor:
        """The objective (B,) with noise, time and hidden labels that follow from the positions."""
        given = self.condition.of(batch, "train", self.settings.label_dropout)
        return self.objective(self.wrapped, batch.x, given, *self._noise(batch, "train"))

    def _noise(self, batch: Batch, purpose: str) -> tuple[Tensor, Tensor]:
        """Noise (B, c, h, w), and the uniform numbers (B,) that become times."""
        seed, z, start = self.settings.seed, batch.x, batch.start
        eps = normal(seed, f"{purpose} noise", start, len(z), tuple(z.shape[1:])).to(z.device, non_blocking=True)
        return eps, uniform(seed, f"{purpose} time", start, len(z))

    def forget(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    # What the loop asks for now and then

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean error of the averaged weights on held-out latents, at noise and times that never change; a distance.

        The distance of samples is found in the first process only, which is the one that writes it down.
        """
        items = evenly_spaced(len(self.held_out), _VALIDATION_LATENTS)
        total = torch.zeros(2, device=self.accelerator.device)
        for start in range(self.share.rank * 64, len(items), self.share.world * 64):
            batch = self._held_out_batch(items[start : start + 64], start)
            with device.autocast(self.settings.precision):
                given = self.condition.of(batch, "val", 0.0)
                errors = self.objective.errors(self.averaged, batch.x, given, *self._noise(batch, "validation"))
            total += torch.stack([errors.sum(), errors.new_tensor(len(errors))])
        total = self.accelerator.reduce(total, "sum")
        figures = {"loss": (total[0] / total[1]).item()}
        if self.accelerator.is_main_process and min(self.settings.kid_samples, len(self.held_out) // 2) > 1:
            figures["kid[encoder]"] = self.watch.of(self.pipeline())
        return figures

    @cached_property
    def watch(self) -> Watch:
        """What looks at samples now and then."""
        settings = self.settings
        return Watch(self.condition, self.held_out, self.vae(), settings.kid_samples, settings.precision)

    def review(self, figures: dict[str, float], step: int, progress: float) -> Review:
        """Diagnoses; and this is when the averages are kept for other lengths."""
        if self.wide and self.accelerator.is_main_process:
            posthoc.write_snapshot(self.settings.out / "ema", step, [self.ema, self.wide])
        return Review(self.diagnoses.of(figures, step, progress))

    @cached_property
    def error_of_zero(self) -> float:
        """The mean error on held-out latents of a network that always answers zero."""
        items = evenly_spaced(len(self.held_out), _VALIDATION_LATENTS)
        parts = (self._held_out_batch(items[start : start + 64], start) for start in range(0, len(items), 64))
        return error_of_zero(self.objective, ((part.x, *self._noise(part, "validation")) for part in parts))

    @torch.no_grad()
    def preview(self) -> Image.Image:
        """Samples of the averaged weights, or what they make of given pictures, at fixed seeds."""
        return sample_sheet(self.pipeline(), self.condition, len(self.held_out), self.settings.precision)

    def pipeline(self) -> LatentDiffusionPipeline:
        """The model as it stands, ready to draw."""
        pipe = LatentDiffusionPipeline(
            self.vae(),
            self.averaged.unet,
            self.objective.scheduler(),
            text_encoder=self.averaged.text_encoder,
            tokenizer=self.condition.tokenizer,
            **self._drawing(),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def export(self, folder: Path) -> None:
        """Write the averaged networks, their scheduler, and what the pipeline has to know."""
        parts = {"unet": self.averaged.unet, "scheduler": self.objective.scheduler()}
        if self.averaged.text_encoder:
            parts["text_encoder"] = self.averaged.text_encoder
        for name, part in parts.items():
            part.save_pretrained(folder / f".{name}")
            publish(folder / f".{name}", folder / name)
        if self.condition.tokenizer:
            text.save_tokenizer(self.condition.tokenizer, folder / ".tokenizer")
            publish(folder / ".tokenizer", folder / "tokenizer")
        index = self.cache.index
        facts = {"vae": index.vae, "fingerprint": index.fingerprint, "objective": self.settings.objective}
        facts |= {"ema_width": self.settings.ema_width, "prompts": self._example_prompts()}
        write_text(folder / "model.json", json.dumps(self._drawing() | facts, indent=1, ensure_ascii=False))

    def _drawing(self) -> dict[str, Any]:
        guidance = self.settings.guidance
        if guidance is None:
            guidance = {"class": 1.5, "text": 2.0}.get(self.condition.kind, 1.0)
        return {
            "id2label": {str(i): name for i, name in enumerate(self.class_names)},
            "condition": self.condition.kind,
            "default_steps": self.settings.sampler_steps,
            "default_guidance": guidance,
        }

    def _example_prompts(self) -> list[str]:
        if self.condition.kind != "text":
            return []
        captions = (self.cache.caption(i) for i in evenly_spaced(len(self.cache), 4 * _EXAMPLE_PROMPTS))
        return list(dict.fromkeys(filter(None, captions)))[:_EXAMPLE_PROMPTS]

    def _held_out_batch(self, items: list[int], start: int) -> Batch:
        numbers = torch.tensor(items)
        shape = tuple(self.cache.index.shape)
        eps = normal(self.settings.seed, "validation posterior", start, len(items), shape)
        z = self.held_out.sample(numbers.numpy(), eps)
        batch = Batch(z, self.held_out.gather(numbers.numpy(), "label"), start, numbers)
        return batch.to(self.accelerator.device)

    def _sheet(self) -> Sheet:
        """The pictures of the cache; raises UserError if they are not those it was made of."""
        file = self.settings.data or self.settings.latents.resolve().parent / "data.json"
        sheet = read_sheet(file)
        if sheet.fingerprint != self.cache.index.fingerprint:
            raise UserError(
                f"--data {file} is not the sheet that --latents {self.settings.latents} was made of; name that one."
            )
        return sheet


def _is_trained(part: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _vae_loader(folder: Path, where: torch.device) -> Callable[[], Vae]:
    """The cache's autoencoder, loaded when it is first needed."""

    @cache
    def load() -> Vae:
        vae = load_autoencoder(folder, "--vae").to(where)
        device.for_drawing(vae)
        return vae

    return load


def main(settings: DiffusionSettings) -> None:
    """`calotype train-diffusion`."""
    accelerator = device.accelerator(settings.precision, trackers=settings.trackers, folder=settings.out)
    cache = LatentCache(settings.latents, "train")
    vae_folder = find_autoencoder(settings.latents, settings.vae, cache.index.vae)
    refuse_differences(accelerator, settings, {"the latents": cache.index.fingerprint + cache.index.vae})
    accelerator.print(f"{len(cache):,} latents of shape {'x'.join(map(str, cache.index.shape))}.")
    loop.fit(DiffusionStage(settings, vae_folder, accelerator), settings, accelerator)


if __name__ == "__main__":
    from calotype.cli import main as cli

    device.leave(lambda: cli(["train-diffusion", *sys.argv[1:]]))
