"""Stage 2: train a diffusion model of cached latents. `calotype train-diffusion`, or torchrun as for stage 1."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from torch import Tensor

from calotype import device, loop
from calotype.checkpoint import publish, weights_hash, write_text
from calotype.data import Batch, evenly_spaced, micro_batches, share_of
from calotype.ema import PowerEma
from calotype.errors import UserError
from calotype.images import image_grid
from calotype.latents import LatentBatches, LatentCache
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.randomness import normal, uniform
from calotype.stage import Review
from calotype.stage2_diffusion import models
from calotype.stage2_diffusion.conditioning import drop_labels
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.objectives import OBJECTIVES

_VALIDATION_LATENTS = 512
_SHEET_ROWS, _SHEET_COLUMNS = 4, 12


class DiffusionStage:
    """Stage 2 as the loop sees it."""

    name = "train-diffusion"
    exports = ("unet", "scheduler", "model.json")

    def __init__(self, settings: DiffusionSettings, vae_folder: Path, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        self.share = share_of(accelerator, settings.batch_size, settings.micro_batches)
        self.cache, self.held_out = LatentCache(settings.latents, "train"), LatentCache(settings.latents, "val")
        index = self.cache.index
        self.vae_folder = vae_folder
        self.class_names = [] if settings.unconditional else index.classes
        self.unet = models.build(settings, tuple(index.shape), len(self.class_names))
        device.choose_attention(self.unet)
        self.objective = OBJECTIVES[settings.objective]()
        self.models = {"unet": self.unet}
        self.identity = {"the latent cache": f"{index.fingerprint}/{index.vae}"}
        optimizer = loop.make_optimizer(self.unet.parameters(), settings, settings.lr)
        self.wrapped, self.optimizer = accelerator.prepare(self.unet, optimizer)
        self.optimizers = {"unet": self.optimizer.optimizer}
        self.ema = PowerEma(self.unet, settings.ema_width)
        self.averages = {"unet": self.ema}
        self.state: dict[str, dict] = {}

    def batches(self, step: int) -> Iterator[Batch]:
        """Latents and labels of this process from `step` on."""
        return LatentBatches(self.cache, self.settings.seed).from_step(step, self.share)

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step on latents (B, c, h, w) and class ids (B,)."""
        figures = self.backward(batch, step)
        norm = loop.update(self.accelerator, self.wrapped, self.optimizer, self.settings.clip)
        self.ema.update(self.unet, step + 1)
        return figures | {"gradient_norm": norm.detach()}

    def backward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The gradients of a step, and its loss as a mean over this process's latents."""
        parts = self.settings.micro_batches
        total = torch.zeros((), device=self.accelerator.device)
        for part in micro_batches(self.accelerator, self.wrapped, batch.to(self.accelerator.device), parts):
            loss = self.losses(self.wrapped, part, self.settings.label_dropout, "train").mean() / parts
            self.accelerator.backward(loss)
            total += loss.detach()
        return {"loss": total}

    def forget(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def review(self, figures: dict[str, float], step: int, progress: float) -> Review:
        """Nothing to say."""
        return Review()

    def losses(self, unet: torch.nn.Module, batch: Batch, label_dropout: float, purpose: str) -> Tensor:
        """The objective (B,) with noise, time and hidden labels that follow from the positions."""
        seed, z, start = self.settings.seed, batch.x, batch.start
        eps = normal(seed, f"{purpose} noise", start, len(z), tuple(z.shape[1:])).to(z.device, non_blocking=True)
        u = uniform(seed, f"{purpose} time", start, len(z))
        y = None
        if self.class_names:
            y = drop_labels(batch.label, len(self.class_names), label_dropout, seed, start)
        return self.objective(unet, z, y, eps, u)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss of the averaged weights on held-out latents, at noise and times that never change."""
        items = evenly_spaced(len(self.held_out), _VALIDATION_LATENTS)
        total = torch.zeros(2, device=self.accelerator.device)
        for start in range(self.share.rank * 64, len(items), self.share.world * 64):
            batch = self._held_out_batch(items[start : start + 64], start)
            with device.autocast(self.settings.precision):
                losses = self.losses(self.ema.model, batch, 0.0, "validation")
            total += torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        total = self.accelerator.reduce(total, "sum")
        return {"loss": (total[0] / total[1]).item()}

    @torch.no_grad()
    def preview(self) -> Image.Image:
        """Samples of the averaged weights at fixed seeds and labels."""
        pipe = self.pipeline()
        count = _SHEET_ROWS * _SHEET_COLUMNS
        with device.autocast(self.settings.precision):
            x = pipe(sheet_labels(self.class_names, count), count, output_type="pt").images
        return image_grid((x * 255).round().byte().cpu(), columns=_SHEET_COLUMNS)

    def pipeline(self) -> LatentDiffusionPipeline:
        """The model as it stands, ready to draw."""
        vae = load_autoencoder(self.vae_folder).to(self.accelerator.device)
        device.choose_attention(vae)
        pipe = LatentDiffusionPipeline(vae, self.ema.model, self.objective.scheduler(), **self._drawing())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def export(self, folder: Path) -> None:
        """Write the averaged UNet, its scheduler, and what the pipeline has to know."""
        for name, part in (("unet", self.ema.model), ("scheduler", self.objective.scheduler())):
            temporary = folder / f".{name}"
            part.save_pretrained(temporary)
            publish(temporary, folder / name)
        index = self.cache.index
        facts = {"vae": index.vae, "fingerprint": index.fingerprint, "objective": self.settings.objective}
        write_text(folder / "model.json", json.dumps(self._drawing() | facts, indent=1))

    def _drawing(self) -> dict:
        names = {str(i): name for i, name in enumerate(self.class_names)}
        return {
            "id2label": names,
            "default_steps": self.settings.sampler_steps,
            "default_guidance": self.settings.guidance if names else 1.0,
        }

    def _held_out_batch(self, items: list[int], start: int) -> Batch:
        numbers = torch.tensor(items).numpy()
        shape = tuple(self.cache.index.shape)
        eps = normal(self.settings.seed, "validation posterior", start, len(items), shape)
        batch = Batch(self.held_out.sample(numbers, eps), self.held_out.gather(numbers, "label"), start)
        return batch.to(self.accelerator.device)


def sheet_labels(class_names: list[str], count: int) -> list[int] | None:
    """Labels of a sample sheet: a column a class while they fit, else spread over all classes."""
    if len(class_names) > _SHEET_COLUMNS:
        return [i * len(class_names) // count for i in range(count)]
    return [i % _SHEET_COLUMNS % len(class_names) for i in range(count)] if class_names else None


def load_autoencoder(folder: Path) -> AutoencoderKL | VQModel:
    """The autoencoder of the cache, for looking at samples."""
    kind = VQModel if AutoencoderKL.load_config(folder)["_class_name"] == "VQModel" else AutoencoderKL
    return kind.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()


def find_autoencoder(settings: DiffusionSettings, expected: str) -> Path:
    """The folder of the cache's autoencoder; raises UserError if it is not the one that made the cache."""
    folder = settings.vae or settings.latents.resolve().parent / "stage1_vae" / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"--vae {folder} is not a saved autoencoder; name the one that made --latents.")
    if weights_hash(folder) != expected:
        raise UserError(
            f"--latents {settings.latents} was made by another autoencoder than --vae {folder}; "
            "run `calotype encode` with this one."
        )
    return folder


def main(settings: DiffusionSettings) -> None:
    """`calotype train-diffusion`."""
    accelerator = device.accelerator(settings.precision, trackers=settings.trackers, folder=settings.out)
    cache = LatentCache(settings.latents, "train")
    vae_folder = find_autoencoder(settings, cache.index.vae)
    accelerator.print(f"{len(cache):,} latents of shape {'x'.join(map(str, cache.index.shape))}.")
    loop.fit(DiffusionStage(settings, vae_folder, accelerator), settings, accelerator)


if __name__ == "__main__":
    from calotype.cli import main as cli

    device.leave(lambda: cli(["train-diffusion", *sys.argv[1:]]))
