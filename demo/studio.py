"""What the page may ask of a model: every request is checked here, and one lock stands before the weights."""

import io
import math
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from calotype.errors import UserError
from calotype.images import fit_image, load_image
from calotype.randomness import key

MOST_IMAGES = 16
MOST_STEPS = 200
MOST_GUIDANCE = 15.0
MOST_SEED = 2**32 - 1
MOST_PROMPT = 400  # characters
MOST_PIXELS = 16_000_000  # a small file can hold a picture that fills the memory


@dataclass(frozen=True)
class Request:
    """A checked order for pictures; picture i is drawn from seed + i."""

    label: str | list[str] | None
    num_images: int
    seed: int
    num_inference_steps: int
    guidance_scale: float


class Reconstruction(NamedTuple):
    """A picture as the model sees it, what comes back from its latents, and how close that is in dB."""

    original: Image.Image
    copy: Image.Image
    psnr: float


class Studio:
    """A LatentDiffusionPipeline that serves one visitor at a time; `explorer` is what the tab Explore shows."""

    def __init__(self, pipe, explorer=None):
        self.pipe = pipe
        self.explorer = explorer
        self._lock = threading.Lock()

    def request(self, label, num_images, seed, steps, guidance) -> Request:
        """What a visitor typed as a Request: numbers out of range are moved to the limit, the rest is refused."""
        self._refuse_label(label)
        count = int(_clamp("number of images", num_images, 1, MOST_IMAGES))
        seed = secrets.randbelow(MOST_SEED + 1) if seed is None else int(_clamp("seed", seed, 0, MOST_SEED))
        return Request(
            label=label or self.any_labels(count, seed),
            num_images=count,
            seed=seed,
            num_inference_steps=int(_clamp("steps", steps, 1, MOST_STEPS)),
            guidance_scale=_clamp("guidance", guidance, 0, MOST_GUIDANCE),
        )

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

    def develop(self, request: Request) -> Iterator:
        """The sampler's events; closing the iterator ends the sampling."""
        try:
            with self._lock:
                yield from self.pipe.stream(**vars(request))
        except ValueError as error:  # the pipeline imports nothing of ours, so this is how it speaks to people
            raise UserError(str(error)) from None

    def reconstruct(self, file: str | Path | None) -> Reconstruction:
        """Send a picture through the latents and back; raises UserError where there is no picture to read."""
        if file is None:
            raise UserError("no picture yet; drop one on the field first")
        content = io.BytesIO(Path(file).read_bytes())  # without a name: a visitor must not see this machine's paths
        picture = load_image(content, channels=self.pipe.image_channels, max_pixels=MOST_PIXELS)
        original = fit_image(picture, self.pipe.image_size, "crop")
        with self._lock:
            (copy,) = self.pipe.reconstruct([original])
        return Reconstruction(original, copy, psnr(original, copy.convert(original.mode)))


def psnr(a: Image.Image, b: Image.Image) -> float:
    """The peak signal-to-noise ratio of two 8-bit pictures in dB; infinite for equal ones."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def _clamp(name: str, value, low: float, high: float) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} {str(value)[:40]!r} is not a number; give one from {low} to {high}")
    return min(max(value, low), high)
