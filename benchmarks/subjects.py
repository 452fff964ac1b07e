"""The product's own stages on made-up latents, for measurements that need no training."""

from pathlib import Path

import torch

from calotype.config import parse
from calotype.device import accelerator
from calotype.latents import Index, write_shard
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.models import build
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.train import DiffusionStage

CLASSES = 10


def write_latents(folder: Path, shape: tuple[int, int, int], count: int = 512, shard_size: int = 20_000) -> Path:
    """A latent cache of standard normal moments (c, h, w): `count` to train on and 64 held out."""
    folder.mkdir(parents=True, exist_ok=True)
    g, shards, hashes = torch.Generator().manual_seed(0), {}, {}
    for split, size in (("train", count), ("val", 64)):
        shards[split] = [f"{split}-{i:05d}.safetensors" for i in range(-(-size // shard_size))]
        for i, name in enumerate(shards[split]):
            n = min(shard_size, size - i * shard_size)
            moments = {"mean": torch.randn(n, *shape, generator=g), "std": torch.full((n, *shape), 0.1)}
            hashes[name] = write_shard(folder / name, moments, torch.arange(n) % CLASSES, [""] * n)
    Index(
        version=2,
        fingerprint="made up",
        vae="made up",
        shape=list(shape),
        flip=False,
        classes=[str(i) for i in range(CLASSES)],
        image_size=[4 * shape[1], 4 * shape[2]],
        counts={"train": count, "val": 64},
        shards=shards,
        sha256=hashes,
    ).write(folder)
    return folder


def write_autoencoder(folder: Path, preset: str, size: int, channels: int = 3) -> Path:
    """An autoencoder of random weights for pictures of that side."""
    words = ["shapes", "--preset", preset, "--out", "unused"]
    build(parse(VaeSettings, words, "train-vae"), channels, (size, size)).vae.save_pretrained(folder)
    return folder


def diffusion_stage(latents: Path, preset: str, batch_size: int, *more: str) -> DiffusionStage:
    """Stage 2 as `calotype train-diffusion` makes it; its autoencoder is loaded only when it is asked to draw."""
    words = ["--latents", str(latents), "--preset", preset, "--batch-size", str(batch_size), "--out", "unused", *more]
    settings = parse(DiffusionSettings, words, "train-diffusion")
    return DiffusionStage(settings, latents.parent / "vae", accelerator(settings.precision))
