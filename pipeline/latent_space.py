"""Walks in the space of latents and of noise: interpolation, inversion, variations, arithmetic, traversal.

Functions of a `LatentDiffusionPipeline`. Inversion and the way back follow the probability-flow ODE.
"""

from collections.abc import Callable, Iterable

import torch
from PIL import Image
from torch import Tensor

from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.ode import follow, path_of
from calotype.pipeline.order import Label, Labels, Order

STEPS = 20  # of the ODE; each is two evaluations
Pipe = LatentDiffusionPipeline
End = int | Image.Image  # a seed, or a picture of the model's size


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a (share 0) to b (share 1) on a great circle, example by example; any shape (B, …).

    Gaussian noise of many numbers lies near a sphere, which a straight line would leave (Shoemake 1985, White 2016).
    Where both point the same way, or opposite ways, the line is taken.
    """
    x, y = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(x, y).clamp(-1, 1)
    angle = cosine.arccos()
    sine = angle.sin()
    straight = sine < 1e-2  # rounding makes as much of it where there is none
    safe = torch.where(straight, 1.0, sine)
    of_a = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / safe)
    of_b = torch.where(straight, share, (share * angle).sin() / safe)
    return (of_a[:, None] * x + of_b[:, None] * y).view_as(a)


@torch.no_grad()
def invert(pipe: Pipe, images: list[Image.Image] | Tensor, label: Labels = None, steps: int = STEPS) -> Tensor:
    """The noise (B, c, h, w) that the model makes these pictures, or latents (B, c, h, w), of, told the label."""
    z = images if isinstance(images, Tensor) else pipe.encode_images(images).float()
    return _follow(pipe, z, label, 0.0, 1.0, steps)


@torch.no_grad()
def develop(pipe: Pipe, noise: Tensor, label: Labels = None, steps: int = STEPS) -> Tensor:
    """Latents (B, c, h, w) of noise by the same ODE, without guidance: the way back of `invert`."""
    return _follow(pipe, noise, label, 1.0, 0.0, steps)


def interpolate(
    pipe: Pipe,
    a: int | Image.Image,
    b: int | Image.Image,
    n: int = 8,
    labels: tuple[Label, Label] = (None, None),
    **order,
) -> list[Image.Image]:
    """n pictures from a to b, each a seed or a picture of the model's size; labels are blended on the way.

    Seeds are drawn as always, with `order`. As soon as one is a picture all follow the ODE without guidance, so that
    the ends are what was given.
    """
    if not isinstance(n, int) or n < 2:
        raise ValueError(f"n={n} must be a whole number from 2 on.")
    ends = [noise_of(pipe, end, label) for end, label in zip((a, b), labels)]
    shares = [i / (n - 1) for i in range(n)]
    noise = torch.cat([slerp(*ends, share) for share in shares])
    told = [blend(*labels, share) for share in shares]
    if isinstance(a, int) and isinstance(b, int):
        return pipe(told, n, latents=noise, **order).images
    return pipe.decode_latents(develop(pipe, noise, told), "pil")


def noise_of(pipe: Pipe, end: End, label: Label = None) -> Tensor:
    """The noise (1, c, h, w) of a seed, or that which a picture is made of."""
    if isinstance(end, int):
        return pipe.prepare_latents([torch.Generator().manual_seed(end)])
    return invert(pipe, [end], label)


def blend(a: Label, b: Label, share: float) -> Label:
    """A label between two: the share of the second is `share`."""
    if a == b or share in (0, 1):
        return b if share == 1 else a
    return {a: 1 - share, b: share}


def variations(
    pipe: Pipe, image: Image.Image, n: int = 8, strength: float = 0.5, label: Label = None, seed: int = 0, **order
) -> list[Image.Image]:
    """n pictures like this one: noised up to the time `strength` with seeds from `seed` on, and drawn again."""
    return pipe(label, n, image=image, strength=strength, seed=seed, **order).images


@torch.no_grad()
def arithmetic(
    pipe: Pipe,
    images: list[Image.Image],
    plus: Iterable[list[Image.Image]],
    minus: Iterable[list[Image.Image]],
    amount: float = 1.0,
) -> list[Image.Image]:
    """Pictures whose codes have moved by `amount` times the mean code of `plus` minus that of `minus`.

    `plus`, `minus`: batches of pictures of the model's size, such as a folder of each of two classes.
    """
    return moved(pipe, images, amount * (mean_code(pipe, plus) - mean_code(pipe, minus)))


def moved(pipe: Pipe, images: list[Image.Image], offset: Tensor) -> list[Image.Image]:
    """Pictures whose codes have moved by an offset (c, h, w)."""
    return pipe.decode_latents(pipe.encode_images(images) + offset, "pil")


@torch.no_grad()
def mean_code(pipe: Pipe, batches: Iterable[list[Image.Image]]) -> Tensor:
    """The mean latents (c, h, w) of pictures that come in batches; raises ValueError where there are none."""
    total, count = 0, 0
    for images in batches:
        z = pipe.encode_images(images).float()
        total, count = total + z.sum(0), count + len(z)
    if not count:
        raise ValueError("arithmetic needs at least one picture on each side.")
    return total / count


@torch.no_grad()
def traverse(pipe: Pipe, z: Tensor, direction: Tensor, amounts: Iterable[float]) -> list[Image.Image]:
    """Pictures of a code z (c, h, w) moved along a direction of that shape by each amount."""
    return pipe.decode_latents(torch.stack([z + amount * direction for amount in amounts]), "pil")


def slope_of(pipe: Pipe, label: Labels, count: int) -> Callable[[Tensor, float], Tensor]:
    """dz/ds of z (count, c, h, w) at s from 0, pictures, to 1, noise, as the model sees it without guidance.

    Raises ValueError for a model that is told a picture.
    """
    if pipe.takes_image:
        raise ValueError(f"this model's condition is {pipe.condition!r}: without its picture there is no way to noise.")
    path, told, plain = path_of(pipe.scheduler.config), pipe.conditions(label, count), Order(guidance_scale=1.0)

    def slope(z: Tensor, s: float) -> Tensor:
        t = torch.tensor(path.time(s), device=z.device)
        return path.slope(z, pipe.predict(z, t, *told, plain), s)

    return slope


def _follow(pipe: Pipe, z: Tensor, label: Labels, begin: float, end: float, steps: int) -> Tensor:
    return follow(slope_of(pipe, label, len(z)), z, begin, end, steps)
