"""What a flow learns the density of: cached latents, or pictures made continuous."""

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from calotype.autoencoder import Vae, decode
from calotype.data import Batch, PictureBatches, Pictures, Share, evenly_spaced
from calotype.density.config import FlowSettings
from calotype.latents import LatentBatches, LatentCache
from calotype.randomness import normal, uniform
from calotype.sheet import read_sheet

Split = Literal["train", "val"]
_WALKED = 1024  # examples at most that are walked through
_SMOOTHING = 0.05  # of latents that no posterior spreads: on single points a density is without bound


class Examples(Protocol):
    """Examples by position; `facts` are those of a flow of them, `identity` what a resumed run must find again."""

    words: str
    shape: tuple[int, int, int]
    classes: list[str]
    labels: Tensor  # (N,) of training
    facts: dict[str, Any]
    identity: dict[str, str]

    def batches(self, step: int, share: Share, seed: int) -> Iterator[Batch]:
        """Batches of one process from a step on, for ever."""

    def walk(self, split: Split, size: int) -> Iterator[Batch]:
        """At most 1,024 examples spread over a split, in batches."""

    def take(self, batch: Batch, purpose: str) -> Tensor:
        """What the flow sees of a batch (B, c, h, w); what is random in it follows from the positions."""

    def pictures(self, z: Tensor, vae: Vae | None) -> Tensor:
        """Pictures (B, C, H, W), about in [-1, 1], of what a flow draws."""


class Latents:
    """Latents of a cache, sampled from their posteriors."""

    words = "latents"

    def __init__(self, settings: FlowSettings):
        assert settings.latents is not None
        self.seed = settings.seed
        self.splits = {split: LatentCache(settings.latents, split) for split in ("train", "val")}
        cache = self.splits["train"]
        index = cache.index
        self.shape, self.classes = tuple(index.shape), index.classes
        self.labels = torch.cat([shard["label"] for shard in cache.shards])
        self.noise = settings.noise
        if self.noise is None:
            self.noise = 0.0 if "std" in cache.shards[0] else _SMOOTHING
        known = {"vae": index.vae, "fingerprint": index.fingerprint, "image_size": tuple(index.image_size)}
        self.facts = {"of": "latents", "shape": self.shape, "noise": self.noise} | known
        self.identity = {"the autoencoder": index.vae, "the data": index.fingerprint}

    def batches(self, step: int, share: Share, seed: int) -> Iterator[Batch]:
        """Batches of one process from a step on, for ever."""
        return LatentBatches(self.splits["train"], seed).from_step(step, share)

    def walk(self, split: Split, size: int) -> Iterator[Batch]:
        """At most 1,024 latents spread over a split, in batches."""
        cache = self.splits[split]
        items = torch.tensor(evenly_spaced(len(cache), _WALKED))
        for start, part in zip(range(0, len(items), size), items.split(size)):
            eps = normal(self.seed, f"flow/posterior {split}", start, len(part), self.shape)
            z = cache.sample(part.numpy(), eps)
            yield Batch(z, cache.gather(part.numpy(), "label"), start, part)

    def take(self, batch: Batch, purpose: str) -> Tensor:
        """The latents (B, c, h, w), spread by some noise where they have none of their own."""
        if not self.noise:
            return batch.x
        eps = normal(self.seed, f"flow/noise {purpose}", batch.start, len(batch.x), self.shape)
        return batch.x + self.noise * eps.to(batch.x)

    def pictures(self, z: Tensor, vae: Vae | None) -> Tensor:
        """The latents decoded."""
        assert vae is not None
        return decode(vae, z, self.facts["image_size"])


class Pixels:
    """Pictures of a data sheet, each of the 256 levels spread evenly over its bin (Theis et al. 2016)."""

    words = "pictures"

    def __init__(self, settings: FlowSettings):
        assert settings.pixels is not None
        sheet = read_sheet(settings.pixels)
        self.seed = settings.seed
        self.splits = {split: Pictures(sheet, split) for split in ("train", "val")}
        self.shape, self.classes = (sheet.channels, *sheet.image_size), sheet.class_names
        self.labels = self.splits["train"].labels
        self.facts = {"of": "pixels", "shape": self.shape, "fingerprint": sheet.fingerprint}
        self.facts |= {"image_size": tuple(sheet.image_size)}
        self.identity = {"the data": sheet.fingerprint}

    def batches(self, step: int, share: Share, seed: int) -> Iterator[Batch]:
        """Batches of one process from a step on, for ever."""
        return PictureBatches(self.splits["train"], seed=seed, flip=False).from_step(step, share)

    def walk(self, split: Split, size: int) -> Iterator[Batch]:
        """At most 1,024 pictures spread over a split, in batches."""
        pictures = self.splits[split]
        items = evenly_spaced(len(pictures), _WALKED)
        for start in range(0, len(items), size):
            part = items[start : start + size]
            yield Batch(torch.stack([pictures[i] for i in part]), pictures.labels[part], start)

    def take(self, batch: Batch, purpose: str) -> Tensor:
        """The pictures (B, C, H, W) in [-1, 1], at a random place in the bins of their levels."""
        u = uniform(self.seed, f"flow/bins {purpose}", batch.start, len(batch.x), self.shape).to(batch.x.device)
        return dequantize(batch.x, u)

    def pictures(self, z: Tensor, vae: Vae | None) -> Tensor:
        """The pictures themselves."""
        return z


def dequantize(x: Tensor, u: Tensor) -> Tensor:
    """Pictures in [-1, 1] of uint8 ones (B, C, H, W), each value at the place u in [0, 1) of its bin."""
    return (x.float() + u) / 128 - 1
