"""Ways through the space of noise, step by step, so that they can be watched and stopped."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from PIL import Image

from calotype.demo.studio import Progress, Request, Studio
from calotype.pipeline.latent_space import blend, develop, noise_of, slerp

BATCH = 4  # pictures that follow the ODE at a time


class Walk(NamedTuple):
    """From a to b, each a seed or a picture of the model's size, with their labels; `request` says how to draw."""

    a: int | Image.Image
    b: int | Image.Image
    labels: tuple[str | None, str | None]
    request: Request


def walking(studio: Studio, walk: Walk) -> Iterator[Progress]:
    """As `latent_space.interpolate`: seeds are drawn, pictures follow the ODE so that they are met."""
    count = walk.request.num_images
    shares = [i / (count - 1) for i in range(count)]
    told = [blend(*walk.labels, share) for share in shares]
    with studio.working() as pipe:
        ends = [noise_of(pipe, end, label) for end, label in zip((walk.a, walk.b), walk.labels, strict=True)]
    noise = torch.cat([slerp(*ends, share) for share in shares])
    seeds_alone = isinstance(walk.a, int) and isinstance(walk.b, int)
    yield from studio.develop_from(walk.request, told, noise) if seeds_alone else following(studio, noise, told)


def following(studio: Studio, noise: torch.Tensor, told: list) -> Iterator[Progress]:
    """Pictures of noise (B, c, h, w) by the ODE, a few at a time."""
    images: list[Image.Image | None] = [None] * len(noise)
    for start in range(0, len(noise), BATCH):
        part = slice(start, start + BATCH)
        with studio.working() as pipe:
            images[part] = pipe.decode_latents(develop(pipe, noise[part], told[part]), "pil")
        yield Progress(min(start + BATCH, len(noise)), len(noise), list(images))
