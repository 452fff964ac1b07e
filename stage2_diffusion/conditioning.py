"""What the network is told beside the noisy latents: a class, a caption, latents of a picture."""

from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from calotype import device
from calotype.data import Batch, Pictures
from calotype.errors import UserError
from calotype.images import normalize
from calotype.latents import LatentCache, mirrored
from calotype.pipeline.pictures import degrade, given_latents, shrink
from calotype.randomness import uniform
from calotype.sheet import Sheet
from calotype.stage2_diffusion import text
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.denoiser import Given
from calotype.stage2_diffusion.masks import random_masks


class Condition(Protocol):
    """Where the network's other inputs come from, and what a pipeline needs to be told of them."""

    kind: str
    class_names: list[str]
    more_channels: int  # of latents that stand beside z_t
    text_encoder: nn.Module | None
    tokenizer: Any

    def of(self, batch: Batch, split: str, dropout: float) -> Given:
        """The inputs that belong to a batch; a share of labels or captions is hidden."""

    def drawing(self, items: list[int]) -> dict[str, Any]:
        """Arguments of the pipeline that draw what these held-out items show."""


class Labels:
    """A class id, or nothing at all; the null class is the last row of the network's own table."""

    more_channels, text_encoder, tokenizer = 0, None, None

    def __init__(self, settings: DiffusionSettings, cache: LatentCache, held_out: LatentCache):
        self.settings, self.held_out = settings, held_out
        self.class_names = [] if settings.condition == "none" else cache.index.classes
        self.kind = "class" if self.class_names else "none"
        if settings.condition == "class" and not self.class_names:
            raise UserError(
                f"--condition class: the pictures of {settings.latents} have no classes; give none or text."
            )

    def of(self, batch: Batch, split: str, dropout: float) -> Given:
        """Class ids (B,)."""
        if not self.class_names:
            return Given()
        null = len(self.class_names)
        return Given(label=drop_labels(batch.label, null, dropout, self.settings.seed, batch.start))

    def drawing(self, items: list[int]) -> dict[str, Any]:
        """The labels of these items."""
        if not self.class_names:
            return {"label": None}
        numbers = self.held_out.gather(torch.tensor(items).numpy(), "label").tolist()
        return {"label": [number if number >= 0 else None for number in numbers]}


class Captions:
    """Token ids of the captions; "" stands for none, as in stock StableDiffusionPipeline."""

    kind, class_names, more_channels = "text", [], 0

    def __init__(self, settings: DiffusionSettings, cache: LatentCache, held_out: LatentCache):
        self.settings = settings
        self.caches = {"train": cache, "val": held_out}
        if cache.index.flip:
            raise UserError(
                f"--condition text: {settings.latents} holds mirror images, of which captions may be wrong; run "
                "`calotype encode` without --flip."
            )
        if settings.text_encoder:
            self.tokenizer, self.text_encoder = text.load(settings.text_encoder, "--text-encoder")
            self.text_encoder.eval().requires_grad_(False)
        elif settings.init:
            self.tokenizer, self.text_encoder = text.load(settings.init, "--init")
        else:
            self.tokenizer = text.train_tokenizer(cache.caption(i) for i in range(len(cache)))
            width, layers = settings.text_width, settings.text_layers
            self.text_encoder = text.build_encoder(self.tokenizer, width, layers, settings.seed)

    def of(self, batch: Batch, split: str, dropout: float) -> Given:
        """Token ids (B, L)."""
        captions = [self.caches[split].caption(item) for item in batch.item.tolist()]
        hidden = uniform(self.settings.seed, "label dropout", batch.start, len(captions)) < dropout
        shown = ["" if hide else caption for hide, caption in zip(hidden.tolist(), captions, strict=True)]
        return Given(tokens=text.tokens(self.tokenizer, shown).to(batch.x.device, non_blocking=True))

    def drawing(self, items: list[int]) -> dict[str, Any]:
        """The captions of these items."""
        return {"label": [self.caches["val"].caption(item) for item in items]}


class GivenPictures(Labels):
    """Latents of a picture with a hole, of a small one or of edges, made on the fly; class ids too where there are any.

    The latents are not cached: those of a picture with a hole must not know what was in the hole.
    """

    def __init__(
        self,
        settings: DiffusionSettings,
        cache: LatentCache,
        held_out: LatentCache,
        sheet: Sheet,
        vae: AutoencoderKL | VQModel,
    ):
        super().__init__(settings, cache, held_out)
        self.kind, self.vae = settings.condition, vae
        self.pictures = {split: Pictures(sheet, split) for split in ("train", "val")}
        self.flip = cache.index.flip
        self.more_channels = cache.index.shape[0] + (self.kind == "inpaint")

    def of(self, batch: Batch, split: str, dropout: float) -> Given:
        """Class ids (B,) and latents (B, k, h, w)."""
        x = torch.stack([self.pictures[split][item] for item in batch.item.tolist()])
        if self.flip and split == "train":
            flipped = mirrored(self.settings.seed, batch.start, len(x))
            x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        mask = None
        if self.kind == "inpaint":
            mask = self.masks(split, batch.start, len(x)).to(batch.x.device, non_blocking=True)
        x = normalize(x.to(batch.x.device, non_blocking=True))
        return super().of(batch, split, dropout)._replace(latents=self.encode(x, mask))

    def drawing(self, items: list[int]) -> dict[str, Any]:
        """The labels and what is given of these items, as pictures."""
        x = normalize(torch.stack([self.pictures["val"][item] for item in items]))
        given = super().drawing(items)
        if self.kind == "inpaint":
            masks = self.masks("val", 0, len(items))
            return given | {"image": _to_pil(x), "mask": _to_pil(2 * masks - 1)}
        if self.kind == "edges":
            return given | {"image": _to_pil(degrade("edges", x))}
        return given | {"image": _to_pil(shrink(x, int(self.kind.partition(":")[2])))}

    def masks(self, split: str, start: int, count: int) -> Tensor:
        """Masks (count, 1, H, W), 1 where the model repaints."""
        size = self.pictures[split].size
        return random_masks(self.settings.seed, split, start, count, size)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What is given of pictures (B, C, H, W) in [-1, 1], as latents."""
        with device.autocast(self.settings.precision):
            shown = x if self.kind == "inpaint" else degrade(self.kind, x)
            return given_latents(self.vae, self.kind, shown, mask).float()


def _to_pil(x: Tensor) -> list[Image.Image]:
    return [to_pil_image((picture / 2 + 0.5).mul(255).round().byte()) for picture in x]


def build(settings: DiffusionSettings, cache: LatentCache, held_out: LatentCache, sheet, vae) -> Condition:
    """The condition that `--condition` names; `sheet` and `vae` are called where pictures are needed."""
    if settings.condition == "text":
        return Captions(settings, cache, held_out)
    if settings.condition in (None, "none", "class"):
        return Labels(settings, cache, held_out)
    return GivenPictures(settings, cache, held_out, sheet(), vae())


def drop_labels(y: Tensor, null: int, probability: float, seed: int, start: int) -> Tensor:
    """Class ids (B,) with some replaced by the null class, so that one network learns both models (Ho & Salimans 2022).

    Unlabelled pictures (-1) always count as the null class.
    """
    hidden = uniform(seed, "label dropout", start, len(y)) < probability
    return y.masked_fill(hidden.to(y.device, non_blocking=True) | (y < 0), null)
