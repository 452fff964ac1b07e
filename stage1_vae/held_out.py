"""What held-out pictures say about an autoencoder while it trains: figures, and a sheet to look at."""

import math

import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor

from calotype.data import Pictures, evenly_spaced
from calotype.images import denormalize, image_grid
from calotype.metrics import psnr
from calotype.randomness import normal
from calotype.stage1_vae.gauges import ActiveUnits, CodeUse, Mean
from calotype.stage1_vae.perceptual import GradientFeatures
from calotype.stage1_vae.regularizers import KL

_PICTURES, _SEEN_PICTURES, _SHEET_PICTURES = 512, 128, 16
_BATCH = 64
Gauge = Mean | CodeUse | ActiveUnits


class HeldOut:
    """Measures a stage on pictures that it does not train on."""

    def __init__(self, stage, pictures: Pictures):
        self.stage, self.pictures = stage, pictures
        # Without a perceptual loss the fixed features still watch over sharpness.
        self.perceptual = stage.perceptual or GradientFeatures()

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Figures over held-out pictures, and the PSNR of some training ones, shared out over the processes."""
        gauges = self._gauges()
        for first, x in self._batches(self.pictures, _PICTURES):
            self._measure(gauges, x, first)
        seen = Mean("psnr[train]")
        for _, x in self._batches(self.stage.pictures, _SEEN_PICTURES):
            seen.add(psnr(self._reconstruct(x), x))
        return self._totals([*gauges.values(), seen])

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """Held-out pictures above their reconstructions; damaged ones between, and samples of the prior below."""
        x = self.stage.take(self.pictures, evenly_spaced(len(self.pictures), _SHEET_PICTURES))
        rows = {"input": x}
        if self.stage.corrupt:
            rows["damaged"] = self._damaged(x, 0)
        rows["output"] = self._reconstruct(rows.get("damaged", x))
        if self._has_bound():
            z = normal(self.stage.settings.seed, "prior sheet", 0, len(x), self.stage.latent_shape).to(x.device)
            rows["prior"] = self.stage.decode(z, tuple(x.shape[2:]))
        sheet = denormalize(torch.cat(list(rows.values())).cpu())
        return image_grid(sheet, columns=len(x), row_labels=list(rows))

    def _gauges(self) -> dict[str, Gauge]:
        names = ["psnr", "perceptual"]
        names += ["psnr_damaged", "psnr_denoised"] if self.stage.corrupt else []
        names += ["bits_per_dim", "rate"] if self._has_bound() else []
        names += ["discriminator_accuracy"] if self.stage.adversary else []
        gauges: dict[str, Gauge] = {name: Mean(name) for name in names}
        vae = self.stage.model.vae
        if isinstance(vae, VQModel):
            return gauges | {"codes": CodeUse(vae.config.num_vq_embeddings)}
        return gauges | {"active": ActiveUnits(self.stage.latent_shape)}

    def _measure(self, gauges: dict[str, Gauge], x: Tensor, first: int) -> None:
        """Take in pictures (B, C, H, W); `first` is the place of the first among those chosen."""
        h = self.stage.encode(x)
        x_hat = self._decode(h, x)
        gauges["psnr"].add(psnr(x_hat, x))
        gauges["perceptual"].add(self.perceptual.distance(*map(self.perceptual.features, (x_hat, x))))
        if "codes" in gauges:
            gauges["codes"].add(self.stage.model.regularizer.indices(h))
        else:
            gauges["active"].add(h.chunk(2, dim=1)[0])
        if "rate" in gauges:
            self._measure_bound(gauges, h, x, first)
        if "discriminator_accuracy" in gauges:
            gauges["discriminator_accuracy"].add(self.stage.adversary.accuracy(x, x_hat))
        if self.stage.corrupt:
            damaged = self._damaged(x, first)
            gauges["psnr_damaged"].add(psnr(damaged.clamp(-1, 1), x))
            gauges["psnr_denoised"].add(psnr(self._reconstruct(damaged), x))

    def _measure_bound(self, gauges: dict[str, Gauge], h: Tensor, x: Tensor, first: int) -> None:
        """The negative ELBO in bits per dimension, one sample of z a picture, and its rate KL(q || p) in nats."""
        stage = self.stage
        eps = normal(stage.settings.seed, "validation posterior", first, len(x), stage.latent_shape).to(x.device)
        z, rate = stage.model.regularizer.sample(h, eps)
        distortion = stage.model.likelihood(stage.decode(z, tuple(x.shape[2:])), x, stage.model.likelihood.log_scale)
        gauges["rate"].add(rate)
        gauges["bits_per_dim"].add((distortion + rate) / (stage.values * math.log(2)))

    def _has_bound(self) -> bool:
        return bool(self.stage.model.likelihood) and isinstance(self.stage.model.regularizer, KL)

    def _damaged(self, x: Tensor, first: int) -> Tensor:
        return self.stage.corrupt(x, self.stage.settings.seed, first, "validation")

    def _reconstruct(self, x: Tensor) -> Tensor:
        return self._decode(self.stage.encode(x), x)

    def _decode(self, h: Tensor, x: Tensor) -> Tensor:
        """x_hat (B, C, H, W) of what the encoder gives, from the posterior's mean."""
        return self.stage.decode(self.stage.model.regularizer.mode(h), tuple(x.shape[2:]))

    def _batches(self, pictures: Pictures, most: int):
        """This process's batches of at most `most` pictures, each with the place of its first."""
        chosen, share = evenly_spaced(len(pictures), most), self.stage.share
        for first in range(share.rank * _BATCH, len(chosen), share.world * _BATCH):
            yield first, self.stage.take(pictures, chosen[first : first + _BATCH])

    def _totals(self, gauges: list[Gauge]) -> dict[str, float]:
        accelerator, figures = self.stage.accelerator, {}
        for gauge in gauges:
            total = accelerator.reduce(gauge.total.float().to(accelerator.device), "sum")
            figures |= gauge.figures(total.cpu())
        return figures
