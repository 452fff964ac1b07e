"""What a drawing is asked for and what it reports.

This file travels inside every saved model beside `pipeline.py`, so it imports nothing but torch and PIL.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

Label = str | int | None | dict[str | int, float]
Labels = Label | list[Label]
Images = Image.Image | list[Image.Image] | None
Generators = torch.Generator | list[torch.Generator] | None
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DECODERS = ("full", "tiny", "linear")
TIMES = 1000


class Event(NamedTuple):
    """One step of a drawing: `step` of `steps` is done, and this is what the pictures look like."""

    step: int
    steps: int
    images: Any


class Order(NamedTuple):
    """How to draw: the keyword arguments of `stream`; None means as the model has it.

    `seed`: picture i is drawn from seed + i; or `generator`: one for all pictures, or a list with one a picture; or
    `latents`: the noise itself (B, c, h, w).
    `guidance_scale` w: weak + w (strong - weak), 1 for none; weak is the network without label or prompt (Ho & Salimans
    2022), or with `autoguidance` the guide (Karras et al. 2024; by default wherever there is one). `guidance_interval`:
    only for times from low to high, 0 the picture and 1 noise (Kynkäänniemi et al. 2024); outside a step is one
    evaluation. `guidance_rescale`: phi from 0 to 1 (Lin et al. 2023).
    `sampler`: one of `SAMPLERS`. `fast`: the student in its few steps, guidance built in, and the tiny decoder.
    `decoder`: "full", "tiny" or, for a glance, "linear". `preview`: whether to show pictures on the way, or a decoder
    for them; by default that of the result if it was named, else the cheapest that the model has.
    `height`, `width`: of the pictures; larger ones than the model was trained on are drawn in overlapping windows.
    `image`: what a model of given pictures begins with, of `given_size`. With any other it is changed: noised up to the
    time `strength` from 0 to 1 and drawn anew from there (Meng et al. 2022). `mask`: where (white) it becomes new;
    a model that was not made for it has the rest put back after every step (Lugmayr et al. 2022). `paste` puts the
    known pixels back at the end.
    `output_type`: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent" (B, c, h, w).
    `callback_on_step_end`: called with the pipeline, step, time and {"latents": z}; may return other latents.
    """

    seed: int = 0
    generator: Generators = None
    latents: Tensor | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    autoguidance: bool | None = None
    sampler: str | None = None
    fast: bool = False
    decoder: str | None = None
    height: int | None = None
    width: int | None = None
    image: Images = None
    mask: Images = None
    strength: float | None = None
    paste: bool = True
    output_type: str = "pil"
    preview: bool | str = True
    callback_on_step_end: Callable[..., dict | None] | None = None

    def guides(self, t: Tensor) -> bool:
        """Whether guidance acts at time t, from 0 to 1000."""
        low, high = self.guidance_interval
        return self.guidance_scale != 1 and low <= float(t) / TIMES <= high

    def check(self, label: Labels, num_images: int) -> None:
        """Raise ValueError where an argument is wrong whatever the model is."""
        steps, seed = self.num_inference_steps, self.seed
        if not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f"num_images={num_images} must be a whole number from 1 on.")
        if steps is not None and (not isinstance(steps, int) or not 1 <= steps <= TIMES):
            raise ValueError(f"num_inference_steps={steps} must be a whole number from 1 to {TIMES}.")
        if not isinstance(seed, int) or not 0 <= seed <= 2**63 - 1 - num_images:
            raise ValueError(f"seed={seed} must be a whole number from 0 to 2**63 - 1 - num_images.")
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={self.output_type!r} must be one of {', '.join(OUTPUT_TYPES)}.")
        if self.decoder not in (None, *DECODERS):
            raise ValueError(f"decoder={self.decoder!r} must be one of {', '.join(DECODERS)}.")
        if not isinstance(self.preview, bool) and self.preview not in DECODERS:
            raise ValueError(f"preview={self.preview!r} must be True, False or one of {', '.join(DECODERS)}.")
        for name, value in (("label", label), ("generator", self.generator)):
            if isinstance(value, list) and len(value) != num_images:
                raise ValueError(f"{name} holds {len(value)} {name}s for num_images={num_images}; give one a picture.")
        self._check_guidance()
        self._check_strength()

    def _check_guidance(self) -> None:
        interval = self.guidance_interval
        if self.guidance_scale is not None and not _is_number(self.guidance_scale, 0, 100):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a number from 0 to 100; 1 means none.")
        if len(interval) != 2 or not all(_is_number(s, 0, 1) for s in interval) or interval[0] > interval[1]:
            raise ValueError(f"guidance_interval={interval} must be two times, low and high, from 0 to 1.")
        if not _is_number(self.guidance_rescale, 0, 1):
            raise ValueError(f"guidance_rescale={self.guidance_rescale} must be a number from 0 to 1.")

    def _check_strength(self) -> None:
        if self.strength is not None and not _is_number(self.strength, 0, 1):
            raise ValueError(f"strength={self.strength} must be a number from 0, the picture itself, to 1, all new.")
        if self.strength is not None and self.image is None:
            raise ValueError(f"strength={self.strength} is about changing a picture; give image too, or leave it out.")
        if self.mask is not None and self.image is None:
            raise ValueError("mask says where a picture becomes new; give image too, or leave it out.")


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
