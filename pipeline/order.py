"""What a drawing is asked for, what may be asked at all, and what it reports.

This file travels inside every saved model beside `pipeline.py`, so it imports nothing but torch, numpy and PIL.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
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
_ALONE = threading.Lock()


class NonFiniteLatents(ValueError):
    """A drawing came to numbers that are not finite: there is no picture. `step` is the last one, 0 before any.

    None where a drawing had its last step already: then the decoder is at fault.
    """

    def __init__(self, step: int | None):
        where = "the decoder's picture is" if step is None else f"the latents after step {step} are"
        super().__init__(f"{where} not finite; weights or precision are at fault: try fp32, or export the model again.")
        self.step = step


class Limits(NamedTuple):
    """The most of everything that one call may ask for; a server sets lower ones."""

    images: int = 4096
    steps: int = TIMES
    guidance: float = 100.0
    seed: int = 2**63 - 1  # of the last picture
    prompt: int = 10_000  # characters
    side: int = 8192  # pixels
    pixels: int = 2**28  # of all pictures together


MOST = Limits()


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
    `reproducible`: each picture by itself on one thread, so that it is the same bit by bit whatever else is drawn with
    it and however many threads there are; slower, by as much as a batch and threads would have gained.
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
    reproducible: bool = False
    output_type: str = "pil"
    preview: bool | str = True
    callback_on_step_end: Callable[..., dict | None] | None = None

    def guides(self, t: Tensor) -> bool:
        """Whether guidance acts at time t, from 0 to 1000."""
        low, high = self.guidance_interval
        return self.guidance_scale != 1 and low <= float(t) / TIMES <= high

    def each(self, label: Labels, num_images: int) -> list[tuple[Label, int, "Order"]]:
        """The same pictures as orders of one each: label, 1, order."""
        return [
            (_of(label, i), 1, self._replace(
                seed=self.seed + i,
                generator=None if self.generator is None else [_of(self.generator, i)],
                latents=None if self.latents is None else self.latents[i : i + 1],
                image=_of(self.image, i),
                mask=_of(self.mask, i),
            ))
            for i in range(num_images)
        ]  # fmt: skip

    # What may be asked of any model; every message begins with the argument, then comes its value, then the way out

    def check(self, label: Labels, num_images: int, limits: Limits = MOST) -> None:
        """Raise ValueError where an argument is wrong whatever the model is."""
        _refuse_no_whole("num_images", num_images, 1, limits.images)
        if self.num_inference_steps is not None:
            _refuse_no_whole("num_inference_steps", self.num_inference_steps, 1, limits.steps)
        _refuse_no_whole("seed", self.seed, 0, limits.seed + 1 - num_images)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                _refuse_no_whole(name, getattr(self, name), 1, limits.side)
        for name in ("fast", "paste", "reproducible"):
            _refuse_unless(isinstance(getattr(self, name), bool), name, getattr(self, name), "must be True or False.")
        self._check_label(label, limits)
        self._check_names()
        self._check_guidance(limits)
        self._check_given()
        self._check_noise()
        self._check_counts(label, num_images)

    def check_pixels(self, num_images: int, size: tuple[int, int], limits: Limits = MOST) -> None:
        """Raise ValueError where so many pictures of a size (height, width) are more than one call may hold."""
        way = f"at {size[1]}x{size[0]} pixels must be up to {limits.pixels // (size[0] * size[1])}; draw fewer at once."
        _refuse_unless(num_images * size[0] * size[1] <= limits.pixels, "num_images", num_images, way)

    def _check_label(self, label: Labels, limits: Limits) -> None:
        for item in _listed(label):
            _refuse_unless(not isinstance(item, list), "label", label, "holds a list in a list; give one a picture.")
            for word in item if isinstance(item, dict) else [item]:
                if isinstance(word, str) and len(word) > limits.prompt:
                    raise ValueError(
                        f"label={word[:40]!r}… has {len(word):,} letters, {limits.prompt:,} are the most; shorten it."
                    )

    def _check_names(self) -> None:
        decoders = f"one of {', '.join(DECODERS)}"
        for name, value, known, way in (
            ("output_type", self.output_type, OUTPUT_TYPES, f"one of {', '.join(OUTPUT_TYPES)}"),
            ("decoder", self.decoder, (None, *DECODERS), decoders),
            ("preview", self.preview, (True, False, *DECODERS), f"True, False or {decoders}"),
            ("autoguidance", self.autoguidance, (None, True, False), "True or False"),
        ):
            fits = isinstance(value, (str, bool, type(None))) and value in known
            _refuse_unless(fits, name, value, f"must be {way}.")
        _refuse_unless(isinstance(self.sampler, (str, type(None))), "sampler", self.sampler, "must be a name.")

    def _check_guidance(self, limits: Limits) -> None:
        scale, interval = self.guidance_scale, self.guidance_interval
        if scale is not None:
            _refuse_no_number("guidance_scale", scale, limits.guidance, "1 means none")
        fits = isinstance(interval, (tuple, list)) and len(interval) == 2 and all(_is_number(s, 0, 1) for s in interval)
        fits = fits and interval[0] <= interval[1]
        _refuse_unless(fits, "guidance_interval", interval, "must be two times, low and high, from 0 to 1.")
        _refuse_no_number("guidance_rescale", self.guidance_rescale, 1, "0 means none")

    def _check_given(self) -> None:
        for name in ("image", "mask"):
            value = getattr(self, name)
            fits = value is None or all(isinstance(item, Image.Image) for item in _listed(value))
            _refuse_unless(fits, name, type(value).__name__, "must be a picture of PIL, or a list of one a picture.")
        if self.strength is not None:
            _refuse_no_number("strength", self.strength, 1, "0 is the picture itself and 1 all new")
            if self.image is None:
                way = "is about changing a picture; give image too, or leave it out."
                raise ValueError(f"strength={self.strength} {way}")
        if self.mask is not None and self.image is None:
            raise ValueError("mask says where a picture becomes new; give image too, or leave it out.")

    def _check_noise(self) -> None:
        kinds, z, back = _listed(self.generator), self.latents, self.callback_on_step_end
        fits = self.generator is None or all(isinstance(item, torch.Generator) for item in kinds)
        _refuse_unless(fits, "generator", type(self.generator).__name__, "must be a torch.Generator, or one a picture.")
        if self.reproducible and isinstance(self.generator, torch.Generator):
            raise ValueError("generator: with reproducible=True each picture needs its own; give a list, or seed.")
        fits = z is None or (isinstance(z, Tensor) and z.is_floating_point() and bool(torch.isfinite(z).all()))
        _refuse_unless(fits, "latents", type(z).__name__, "must be a tensor of finite numbers.")
        _refuse_unless(back is None or callable(back), "callback_on_step_end", back, "must be a function.")

    def _check_counts(self, label: Labels, num_images: int) -> None:
        named = {"label": label, "generator": self.generator, "image": self.image, "mask": self.mask}
        for name, value in named.items():
            if isinstance(value, list) and len(value) != num_images:
                what = f"{name}s" if name in ("label", "generator") else "pictures"
                raise ValueError(f"{name} holds {len(value)} {what} for num_images={num_images}; give one a picture.")


def joined(events: list[Event]) -> Event:
    """The same step of drawings of one picture each as that of one drawing."""
    images = [event.images for event in events]
    if len(events) == 1 or images[0] is None:
        return events[0]
    if isinstance(images[0], list):
        return events[0]._replace(images=[image for part in images for image in part])
    return events[0]._replace(images=torch.cat(images) if isinstance(images[0], Tensor) else np.concatenate(images))


@contextmanager
def alone() -> Iterator[None]:
    """One thread and one algorithm for each shape while this lasts; other reproducible drawings wait."""
    cudnn = torch.backends.cudnn
    with _ALONE:
        before = torch.get_num_threads(), cudnn.benchmark, cudnn.deterministic
        try:
            torch.set_num_threads(1)
            cudnn.benchmark, cudnn.deterministic = False, True
            yield
        finally:
            torch.set_num_threads(before[0])
            cudnn.benchmark, cudnn.deterministic = before[1:]


def _of(value: Any, i: int) -> Any:
    return value[i] if isinstance(value, list) else value


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _refuse_unless(fits: bool, name: str, value: Any, why: str) -> None:
    if not fits:
        text = repr(value)
        raise ValueError(f"{name}={text if len(text) <= 60 else f'{text[:59]}…'} {why}")


def _refuse_no_whole(name: str, value: Any, low: int, high: int) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _refuse_unless(fits, name, value, f"must be a whole number from {low} to {high}.")


def _refuse_no_number(name: str, value: Any, high: float, meaning: str) -> None:
    _refuse_unless(_is_number(value, 0, high), name, value, f"must be a number from 0 to {high:g}; {meaning}.")


def _is_number(value: Any, low: float, high: float) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and low <= value <= high  # comparisons with nan are false
