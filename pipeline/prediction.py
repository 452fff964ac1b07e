"""What the network says about noisy latents, under guidance, and in windows where they are larger than it knows.

This file travels inside every saved model beside `pipeline.py`, so it imports nothing but torch and diffusers.
"""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

UNet = UNet2DModel | UNet2DConditionModel
Windows = list[tuple[slice, slice]]


class Conditions(NamedTuple):
    """What a network is told beside z and t: classes, text (B, n, d), channels beside z (B, c', h, w).

    Classes are ids (B,), or shares of each class in blends of them (B, classes + 1).
    """

    labels: Tensor | None = None
    text: Tensor | None = None
    given: Tensor | None = None

    def beside(self, other: "Conditions") -> "Conditions":
        """These and others as one batch."""
        return Conditions(*(None if a is None else torch.cat([a, b]) for a, b in zip(self, other, strict=True)))

    def at(self, window: tuple[slice, slice]) -> "Conditions":
        """The same for a part of the latents."""
        return self._replace(given=None if self.given is None else self.given[:, :, *window])


Told = tuple[Conditions, Conditions | None]  # and the same without labels or prompts; None where that is no different


def evaluate(unet: UNet, z: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    """The network's output (B, c, h, w) for noisy latents of that shape, in their precision."""
    x = z if conditions.given is None else torch.cat([z, conditions.given.to(z)], dim=1)
    x = x.to(unet.conv_in.weight.dtype)  # `unet.dtype` looks through all modules, as long as a small layer takes
    if conditions.text is not None:
        return unet(x, t, encoder_hidden_states=conditions.text).sample.to(z.dtype)
    y = conditions.labels
    if y is None or not y.is_floating_point():
        return unet(x, t, class_labels=y).sample.to(z.dtype)
    # A blend of classes is the blend of their embeddings, put in the place of the table.
    table = y.to(unet.class_embedding.weight.dtype) @ unet.class_embedding.weight
    rows = torch.arange(len(y), device=y.device)
    return _with_classes(unet, table)(x, t, class_labels=rows).sample.to(z.dtype)


def _with_classes(unet: UNet, table: Tensor) -> UNet:
    """The same network with another table of class embeddings, and all other parts shared.

    Another thread may be drawing with the network, so nothing in it is swapped, not even for the time of a call.
    """
    found = copy.copy(unet)
    found._modules = unet._modules | {"class_embedding": nn.Embedding.from_pretrained(table)}
    return found


def guide(strong: Tensor, weak: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """weak + w (strong - weak), its deviation brought back by the share phi to that of `strong`, picture by picture.

    Rescaling is Lin et al. 2023 (eq. 15 and 16), which works on the output of the network as it is: v, eps or x0.
    """
    guided = weak + scale * (strong - weak)
    ratio = strong.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True).clamp_min(1e-12)
    return guided * (rescale * ratio + 1 - rescale)


def windows(shape: tuple[int, int], window: tuple[int, int]) -> Windows:
    """Overlapping windows (h, w) that cover latents of a shape (h, w): half of each also belongs to the next."""
    return [(rows, columns) for rows in _spans(shape[0], window[0]) for columns in _spans(shape[1], window[1])]


def in_windows(predict: Callable[[Tensor, Told], Tensor], z: Tensor, told: Told, parts: Windows) -> Tensor:
    """A prediction (B, c, H, W) joined from windows, each counting most in its middle (Bar-Tal et al. 2023)."""
    total, weights = torch.zeros_like(z), torch.zeros_like(z[:1, :1])
    for part in parts:
        here = told[0].at(part), told[1].at(part) if told[1] else None
        x = z[:, :, *part]
        weight = torch.outer(_hat(x.shape[2]), _hat(x.shape[3])).to(z)
        total[:, :, *part] += weight * predict(x, here)
        weights[:, :, *part] += weight
    return total / weights


def _spans(length: int, window: int) -> Iterator[slice]:
    count = max(1, -(-2 * (length - window) // window) + 1)
    for i in range(count):
        start = round(i * (length - window) / max(count - 1, 1))
        yield slice(start, start + window)


def _hat(length: int) -> Tensor:
    """From near 0 at both ends to 1 in the middle."""
    ramp = torch.arange(1, length + 1) / ((length + 1) / 2)
    return torch.minimum(ramp, 2 - ramp)
