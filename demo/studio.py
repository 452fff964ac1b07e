"""What the page may ask of a model: every request is checked here, and one lock stands before the weights."""

import itertools
import math
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from calotype.demo.uploads import open_picture
from calotype.errors import UserError
from calotype.images import fit_image
from calotype.pipeline import facts
from calotype.pipeline.generate import translated
from calotype.pipeline.order import Limits, Order
from calotype.pipeline.samplers import SAMPLERS
from calotype.randomness import key

MOST_IMAGES = 16
MOST_STEPS = 200
MOST_GUIDANCE = 15.0
MOST_SEED = 2**32 - 1
MOST_PROMPT = 400  # characters
MOST_CELLS = 36  # pictures of a grid
MOST_EVALUATIONS = 2000  # steps that a grid may take in all
LIMITS = Limits(images=MOST_IMAGES, steps=MOST_STEPS, guidance=MOST_GUIDANCE, seed=MOST_SEED, prompt=MOST_PROMPT)
# How an argument of the pipeline is called on the page.
_NAMES = {
    "num_images": "number of images",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "guidance_interval": "guidance from and to",
    "guidance_rescale": "guidance rescale",
    "label": "label",
    "seed": "seed",
    "sampler": "sampler",
    "fast": "Fast",
    "strength": "strength",
    "image": "picture",
    "mask": "mask",
}


@dataclass(frozen=True)
class Request:
    """A checked order for pictures; picture i is drawn from seed + i."""

    label: str | list[str] | None
    num_images: int
    seed: int
    num_inference_steps: int
    guidance_scale: float | None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    sampler: str | None = None
    fast: bool = False

    def check(self) -> None:
        """Raise UserError where a number is beyond what this server draws."""
        order = asdict(self)
        try:
            Order(**{name: order[name] for name in order if name in Order._fields}).check(None, self.num_images, LIMITS)
        except ValueError as error:
            raise UserError(translated(str(error), _NAMES)) from None

    def alone(self, i: int) -> "Request":
        """The order for picture i by itself."""
        label = self.label[i] if isinstance(self.label, list) else self.label
        return replace(self, label=label, num_images=1, seed=self.seed + i)


class Progress(NamedTuple):
    """How far a drawing is: `done` of `total` steps, and its pictures so far, None where nothing is to be seen yet."""

    done: int
    total: int
    images: list[Image.Image | None]


class Studio:
    """A LatentDiffusionPipeline that serves one visitor at a time; `explorer` is what the tab Explore shows."""

    def __init__(self, pipe, explorer=None, folder: Path | None = None):
        self.pipe = pipe
        self.explorer = explorer
        self.folder = folder
        self._lock = threading.Lock() if explorer is None else explorer.lock  # both use the same weights
        self.tell: Callable[[str], object] = lambda words: None  # a visitor who waits
        self.is_loading = False

    # What may be asked

    def request(
        self, label, num_images, seed, steps, guidance, sampler=None, low=0, high=1, rescale=0, fast=False
    ) -> Request:
        """What a visitor typed as a Request; raises UserError for what is beyond the limits."""
        self._refuse_label(label)
        if sampler and sampler not in SAMPLERS:
            raise UserError(f"sampler {str(sampler)[:40]!r} is not known; choose one from the list")
        if fast and not self.has_student:
            raise UserError("this model has no fast student; turn Fast off")
        interval = sorted([number("guidance from", low), number("guidance to", high)])
        request = Request(
            label=label or None,
            num_images=whole("number of images", num_images),
            seed=secrets.randbelow(MOST_SEED - MOST_IMAGES) if seed is None else whole("seed", seed),
            num_inference_steps=whole("steps", steps),
            guidance_scale=None if fast else number("guidance", guidance),
            guidance_interval=tuple(interval),
            guidance_rescale=number("guidance rescale", rescale),
            sampler=None if fast else sampler or None,
            fast=bool(fast),
        )
        request.check()
        return request if label else replace(request, label=self.any_labels(request.num_images, request.seed))

    def any_request(self) -> Request:
        """An order for one picture as the model likes it."""
        return self.request("", 1, None, self.pipe.default_steps, min(self.pipe.default_guidance, MOST_GUIDANCE))

    def _refuse_label(self, label) -> None:
        """A prompt is any short text, a label one of those that the model knows."""
        if self.pipe.condition == "text":
            if label is not None and (not isinstance(label, str) or len(label) > MOST_PROMPT):
                raise UserError(f"the prompt must be a text of up to {MOST_PROMPT} characters; shorten it")
        elif label and label not in self.pipe.labels:
            raise UserError(f"label {str(label)[:80]!r} is not one of this model's; choose one from the list")

    def any_labels(self, count: int, seed: int) -> list[str] | None:
        """A label for each picture, drawn from seed + i like the picture itself; None for a model without labels."""
        if not self.pipe.labels:
            return None
        return [self.pipe.labels[key(seed + i, "any label") % len(self.pipe.labels)] for i in range(count)]

    @property
    def has_student(self) -> bool:
        """Whether the model can draw in a few steps."""
        return self.pipe.student is not None and self.pipe.student_scheduler is not None

    @property
    def is_guided(self) -> bool:
        """Whether guidance makes a difference."""
        return self.pipe.condition == "text" or bool(self.pipe.labels) or self.pipe.guide is not None

    @cached_property
    def model(self) -> str:
        """The first digits of the weights' hash, as `calotype generate` writes it; empty where nothing was saved."""
        return self.about["unet"]["model"]

    @cached_property
    def about(self) -> dict[str, dict[str, str]]:
        """What pictures by the network, and by the student, tell of the model."""
        names = ["unet", *(["student"] if self.has_student else [])]
        return {name: facts.about(self.folder, name) for name in names}

    def facts(self, request: Request) -> dict:
        """What a finished picture tells of how it was made; `request` is for that picture alone."""
        order = asdict(request)
        order = Order(**{name: value for name, value in order.items() if name in Order._fields})
        about = self.about["student" if request.fast else "unet"]
        told = {"label": request.label or "", "seed": request.seed}
        return told | facts.drawn(self.pipe, order, "fp32") | about

    # What is done

    def load_later(self, fill: Callable[[], object]) -> Callable[[], None]:
        """Let everybody wait until what this returns was called, which calls `fill` and may do so in another thread."""
        self._lock.acquire()
        self._say_loading(True)

        def load() -> None:
            fill()
            if self.explorer is not None:
                self.explorer.prepare()
            self._say_loading(False)
            self._lock.release()

        return load

    def _say_loading(self, is_loading: bool) -> None:
        self.is_loading = is_loading
        if self.explorer is not None:
            self.explorer.is_loading = is_loading

    @contextmanager
    def working(self) -> Iterator:
        """The pipeline, while nobody else has it; what it says about an order becomes a UserError."""
        if self.is_loading:
            self.tell("The model is still being loaded; this goes on as soon as it is there.")
        with self._lock:
            try:
                yield self.pipe
            except ValueError as error:  # the pipeline imports nothing of ours, so this is how it speaks to people
                raise UserError(translated(str(error), _NAMES)) from None

    def develop(self, request: Request, **more) -> Iterator[Progress]:
        """The drawing step by step, with `more` for `stream`; closing the iterator ends it."""
        order = asdict(request) | more
        with self.working() as pipe, closing(pipe.stream(**order)) as events:
            yield from itertools.starmap(Progress, events)

    def develop_from(self, request: Request, labels: list, noise: Tensor) -> Iterator[Progress]:
        """The drawing from noise (B, c, h, w), each picture told its label or blend of labels."""
        yield from self.develop(request, label=labels, num_images=len(noise), seed=0, latents=noise)

    def develop_cells(self, cells: list[Request]) -> Iterator[Progress]:
        """Draw orders of one picture each; neighbours that differ in label and seed alone are drawn as one batch."""
        total = refuse_long(cells)
        images: list[Image.Image | None] = [None] * len(cells)
        done = start = 0
        for batch in _batches(cells):
            generators = [torch.Generator().manual_seed(cell.seed) for cell in batch]
            steps = batch[0].num_inference_steps
            for part in self.develop(_joined(batch), generator=generators):
                if part.images is not None:
                    images[start : start + len(batch)] = part.images
                yield Progress(done + round(part.done / part.total * steps), total, list(images))
            start += len(batch)
            done += steps

    def picture(self, file) -> Image.Image:
        """An upload at the model's size; raises UserError where there is none that can be read."""
        return fit_image(open_picture(file, channels=self.pipe.image_channels), self.pipe.image_size, "crop")

    def encode(self, picture: Image.Image) -> Tensor:
        """The code z (c, h, w) of a picture of the model's size."""
        with self.working() as pipe:
            return pipe.encode_images([picture])[0]

    def decode(self, z: Tensor) -> Image.Image:
        """The picture of a code (c, h, w)."""
        with self.working() as pipe, torch.no_grad():
            return pipe.decode_latents(z[None], "pil")[0]


def refuse_long(cells: list[Request]) -> int:
    """The steps that a grid takes in all; raises UserError where they are too many."""
    if len(cells) > MOST_CELLS:
        raise UserError(f"the grid has {len(cells)} pictures, {MOST_CELLS} are the most; give fewer values")
    total = sum(batch[0].num_inference_steps for batch in _batches(cells))
    if total > MOST_EVALUATIONS:
        raise UserError(
            f"the grid takes {total:,} steps, {MOST_EVALUATIONS:,} are the most; give fewer or shorter ones"
        )
    return total


def _batches(cells: list[Request]) -> list[list[Request]]:
    def settings(cell: Request) -> Request:
        return replace(cell, label=None, seed=0)

    return [list(batch) for _, batch in itertools.groupby(cells, key=settings)]


def _joined(batch: list[Request]) -> Request:
    """The order for a batch whose seeds come as generators."""
    labels = [cell.label for cell in batch]
    return replace(batch[0], label=None if labels.count(None) == len(labels) else labels, num_images=len(batch))


def number(name: str, value) -> float:
    """A number as it came; raises UserError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} {str(value)[:40]!r} is not a number; give one")
    return value


def whole(name: str, value) -> float:
    """A number, as an int where the browser sent 3.0; raises UserError for what is none."""
    value = number(name, value)
    return int(value) if float(value).is_integer() else value


def clamp(name: str, value, low: float, high: float) -> float:
    """The number nearest to `value` from low to high; raises UserError for what is no number."""
    return min(max(number(name, value), low), high)
