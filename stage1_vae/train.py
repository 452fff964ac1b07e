"""Stage 1: train an autoencoder on pictures. `calotype train-vae`, or `torchrun -m calotype.stage1_vae.train`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import VQModel
from PIL import Image
from torch import Tensor

from calotype import device, loop
from calotype.checkpoint import publish
from calotype.config import PRESET_IMAGE_SIZE
from calotype.data import Batch, PictureBatches, Pictures, evenly_spaced, micro_batches, share_of
from calotype.images import denormalize, image_grid, normalize
from calotype.randomness import key, normal
from calotype.sheet import Sheet, open_sheet, refuse_flip, summary
from calotype.stage1_vae import folding, models
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.corruption import parse_corruption
from calotype.stage1_vae.gauges import ActiveUnits, CodeUse, Psnr
from calotype.stage1_vae.losses import RECONSTRUCTION
from calotype.stage1_vae.regularizers import KL, VectorQuantization

_VALIDATION_PICTURES = 512
_STATISTICS_PICTURES = 16_384  # enough for a relative error of the deviation well below 1 %
_SHEET_PICTURES = 16


class VaeStage:
    """Stage 1 as the loop sees it."""

    name = "train-vae"
    exports = ("vae",)

    def __init__(self, settings: VaeSettings, sheet: Sheet, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        self.share = share_of(accelerator, settings.batch_size, settings.micro_batches)
        self.pictures, self.held_out = Pictures(sheet, "train"), Pictures(sheet, "val")
        size = tuple(sheet.image_size)
        self.model = models.build(settings, sheet.channels, size)
        if settings.init and not isinstance(self.model.vae, VQModel):
            folding.ensure_quant_convs(self.model.vae)
        device.choose_attention(self.model)
        self.latent_shape = models.latent_shape(self.model.vae, size)
        self.reconstruction = RECONSTRUCTION[settings.reconstruction]
        self.corrupt = parse_corruption(settings.corruption)
        self.values = sheet.channels * size[0] * size[1]
        self.batch_source = PictureBatches(self.pictures, seed=settings.seed, flip=settings.flip)
        self._start_codebook()
        self.models = {"vae": self.model.vae}  # holds every parameter, a codebook included
        if isinstance(self.model.regularizer, VectorQuantization):
            self.models["codebook"] = self.model.regularizer.average
        self.averages = {}
        self.identity = {"the data": sheet.fingerprint}
        optimizer = loop.make_optimizer(self.model, settings)
        self.wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.optimizers = {"vae": self.optimizer.optimizer}

    def batches(self, step: int) -> Iterator[Batch]:
        """Pictures of this process from `step` on."""
        return self.batch_source.from_step(step, self.share, self.settings.workers)

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step on pictures (B, C, H, W)."""
        parts = self.settings.micro_batches
        figures: list[dict[str, Tensor]] = []
        for part in micro_batches(self.accelerator, self.wrapped, batch.to(self.accelerator.device), parts):
            loss, terms = self.loss(part, step)
            self.accelerator.backward(loss / parts)
            figures.append(terms)
        norm = loop.update(self.accelerator, self.wrapped, self.optimizer, self.settings.clip)
        self.model.regularizer.after_step()
        means = {name: torch.stack([terms[name] for terms in figures]).mean() for name in figures[0]}
        return means | {"gradient_norm": norm.detach()}

    def penalty_weight(self, step: int) -> float:
        """Weight of the regulariser: for the KL term beta, grown over the warm-up and shared out over the values.

        beta at step s is min(1, s / warm-up) * beta (Bowman et al. 2016); a penalty in nats over the number of values
        lets beta mean the same at any picture size.
        """
        if not isinstance(self.model.regularizer, KL):
            return 1.0
        warmup = self.settings.beta_warmup
        return self.settings.beta / self.values * (min(1.0, step / warmup) if warmup else 1.0)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a batch, and its terms: reconstruction + weight * penalty."""
        x = normalize(batch.x)
        eps = normal(self.settings.seed, "posterior", batch.start, len(x), self.latent_shape)
        eps = eps.to(x.device, non_blocking=True)
        damaged = self.corrupt(x, self.settings.seed, batch.start, "train") if self.corrupt else x
        out = self.wrapped(damaged, eps)
        reconstruction = self.reconstruction(out.x_hat, x).mean()
        penalty = out.penalty.mean()
        loss = reconstruction + self.penalty_weight(step) * penalty
        terms = {"loss": loss, "reconstruction": reconstruction, self.model.regularizer.name: penalty}
        return loss, {name: value.detach() for name, value in terms.items()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Figures over held-out pictures, shared out over the processes."""
        gauges = self._gauges()
        chosen = evenly_spaced(len(self.held_out), _VALIDATION_PICTURES)
        for first in range(self.share.rank * 64, len(chosen), self.share.world * 64):
            self._measure(gauges, self._batch(self.held_out, chosen[first : first + 64]), first)
        figures: dict[str, float] = {}
        for gauge in gauges.values():
            total = self.accelerator.reduce(gauge.total.float().to(self.accelerator.device), "sum")
            figures |= gauge.figures(total.cpu())
        return figures

    def _gauges(self) -> dict[str, Psnr | CodeUse | ActiveUnits]:
        gauges: dict[str, Psnr | CodeUse | ActiveUnits] = {"psnr": Psnr()}
        if isinstance(self.model.vae, VQModel):
            gauges["codes"] = CodeUse(self.model.vae.config.num_vq_embeddings)
        else:
            gauges["active"] = ActiveUnits(self.latent_shape)
        if self.corrupt:
            gauges |= {"damaged": Psnr("psnr_damaged"), "denoised": Psnr("psnr_denoised")}
        return gauges

    def _measure(self, gauges: dict, x: Tensor, first: int) -> None:
        """Take in pictures (B, C, H, W); `first` is the place of the first among those chosen."""
        h = self._encode(x)
        gauges["psnr"].add(self._decode(h), x)
        if "codes" in gauges:
            gauges["codes"].add(self.model.regularizer.indices(h))
        else:
            gauges["active"].add(h.chunk(2, dim=1)[0])
        if self.corrupt:
            damaged = self.corrupt(x, self.settings.seed, first, "validation")
            gauges["damaged"].add(damaged.clamp(-1, 1), x)
            gauges["denoised"].add(self._decode(self._encode(damaged)), x)

    @torch.no_grad()
    def preview(self) -> Image.Image:
        """Held-out pictures above their reconstructions; a denoising autoencoder is shown damaged ones."""
        x = self._batch(self.held_out, evenly_spaced(len(self.held_out), _SHEET_PICTURES))
        rows = {"input": x}
        if self.corrupt:
            rows["damaged"] = self.corrupt(x, self.settings.seed, 0, "validation")
        rows["output"] = self._decode(self._encode(rows.get("damaged", x)))
        sheet = denormalize(torch.cat(list(rows.values())).cpu())
        return image_grid(sheet, columns=len(x), row_labels=list(rows))

    def export(self, folder: Path) -> None:
        """Fold the latent statistics and write the autoencoder as folder/vae."""
        vae = self.model.vae.eval()
        log_variance = getattr(self.model.regularizer, "fixed_log_variance", None)
        if log_variance is not None:
            folding.fix_variance(vae, log_variance)
        folding.fold(vae, self._statistics())
        temporary = folder / ".vae"
        vae.save_pretrained(temporary, safe_serialization=True)
        publish(temporary, folder / "vae")

    @torch.no_grad()
    def _statistics(self) -> folding.Statistics:
        """Statistics of the latents over the training pictures (at most 16,384 of them, spread evenly)."""
        running = folding.RunningStatistics()
        for numbers in _chunks(evenly_spaced(len(self.pictures), _STATISTICS_PICTURES), 128):
            x = self._batch(self.pictures, numbers)
            h = self._encode(x)
            if isinstance(self.model.vae, VQModel):
                running.add(self.model.regularizer(h, h)[0])
            else:
                mean, logvar = h.chunk(2, dim=1)
                running.add(mean, logvar.clamp(-30, 20).cpu().double().exp())
        return running.result()

    def _encode(self, x: Tensor) -> Tensor:
        """What the regulariser takes, of pictures (B, C, H, W)."""
        with device.autocast(self.settings.precision):
            return self.model.encode(x)

    def _decode(self, h: Tensor) -> Tensor:
        """x_hat (B, C, H, W), clamped, from the posterior's mean."""
        z, _ = self.model.regularizer(h, torch.zeros(len(h), *self.latent_shape, device=h.device))
        with device.autocast(self.settings.precision):
            return self.model.decode(z).float().clamp(-1, 1)

    def _batch(self, pictures: Pictures, numbers: list[int]) -> Tensor:
        return normalize(torch.stack([pictures[i] for i in numbers]).to(self.accelerator.device))

    @torch.no_grad()
    def _start_codebook(self) -> None:
        """Begin VQ from codes of real pictures; a resumed run overwrites them."""
        if isinstance(self.model.regularizer, VectorQuantization) and not self.settings.init:
            numbers = evenly_spaced(len(self.pictures), 256)
            parts = (torch.stack([self.pictures[i] for i in part]) for part in _chunks(numbers, 16))
            h = torch.cat([self.model.encode(normalize(x)) for x in parts])
            generator = torch.Generator().manual_seed(key(self.settings.seed, "codebook"))
            self.model.regularizer.start_from(h, generator)


def main(settings: VaeSettings) -> None:
    """`calotype train-vae`."""
    accelerator = device.accelerator(settings.precision, trackers=settings.trackers, folder=settings.out)
    size = PRESET_IMAGE_SIZE[settings.preset]
    sheet = open_sheet(settings.source, settings, settings.seed, settings.out, size)
    refuse_flip(settings.flip, sheet)
    accelerator.print(summary(sheet))
    stage = VaeStage(settings, sheet, accelerator)
    if accelerator.is_main_process:
        sheet.keep(Path(settings.source), settings.out)
    loop.fit(stage, settings, accelerator)


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


if __name__ == "__main__":
    from calotype.cli import main as cli

    sys.exit(cli(["train-vae", *sys.argv[1:]]))
