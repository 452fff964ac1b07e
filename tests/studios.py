"""Studios of tiny pipelines, and pictures to give them."""

import functools
import io

import numpy as np
from models import pipeline, tiny_unet, variants
from PIL import Image, ImageChops

from calotype.demo.studio import Studio

EVIL = "<img src=x onerror=alert(1)>"
COLOURS = {"0": "red", "1": "blue", "2": EVIL}


@functools.cache
def coloured():
    """A studio of three labels, one of them no text for a page."""
    return Studio(pipeline(tiny_unet(classes=3, width=16), id2label=COLOURS))


@functools.cache
def of_each_kind():
    """A studio for each thing that a drawing can be told, by name."""
    return {name: Studio(pipe) for name, pipe in variants().items()}


def photograph(size=(16, 16), mode="RGB"):
    x = np.random.default_rng(3).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(x).resize(size, Image.Resampling.BICUBIC).convert(mode)


def file_of(picture, path):
    picture.save(path)
    return str(path)


def png(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def furthest(a, b):
    return max(high for _, high in ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getextrema())
