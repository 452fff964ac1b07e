"""A strange picture as it is shown: with its heat-map, the nearest normal ones, and a bar for each score."""

import base64
import functools
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from PIL import Image
from torch import Tensor

from calotype import report
from calotype.density import heat
from calotype.density.calibration import COMBINATION
from calotype.images import to_pil

_HERE = Path(__file__).parent
_LOSSLESS = 96  # pixels of the longer side up to which a picture is kept bit by bit
_LONGEST = 256
# What the macro `legend` is given.
HEAT = {"stops": heat.gradient(), "ticks": [2**i for i in range(int(math.log2(heat.MOST)) + 1)]}


class Bar(NamedTuple):
    """A score of a picture: its value, the share of the bar that is full, and how many normal pictures reach it."""

    name: str
    value: float
    percent: float
    words: str
    alarm: bool


class Row(NamedTuple):
    """A picture with all that is said of it; `kind` is normal or other, or empty where that is not known."""

    name: str
    kind: str
    picture: report.Sheet
    heat: report.Sheet
    neighbours: list[report.Sheet]
    bars: list[Bar]

    @property
    def alarm(self) -> bool:
        """Whether the combination raises the alarm."""
        return self.bars[0].alarm

    @property
    def words(self) -> str:
        """How strange the combination is, in words."""
        return self.bars[0].words


def row(name: str, kind: str, pixels: Tensor, map: Tensor, neighbours: Tensor, bars: list[Bar]) -> Row:
    """The row of a picture (C, H, W) with its map (H, W) and the nearest normal ones (3, C, H, W), all uint8 but it."""
    near = [embedded(to_pil(one)) for one in neighbours]
    return Row(name, kind, embedded(to_pil(pixels)), embedded(heat.overlay(pixels, map)), near, bars)


def bars(scores: dict[str, float], p: dict[str, float], limits: dict[str, float], normals: int) -> list[Bar]:
    """A bar for each score, the combination first; it is full where no held-out normal picture is as strange."""
    return [
        Bar(name, scores[name], fullness(p[name], normals), as_strange(p[name], normals), scores[name] >= limits[name])
        for name in combined_first(scores)
    ]


def fullness(p: float, normals: int) -> float:
    """From 0 for p = 1 to 100 for the least p that so many held-out normal pictures allow; each halving is a step."""
    return min(100.0, max(0.0, 100 * math.log(p) / math.log(1 / (normals + 1))))


def as_strange(p: float, normals: int) -> str:
    """A conformal p, (1 + k) / (1 + n) for k of n normal pictures at least as strange, in words."""
    count = max(round(p * (normals + 1)) - 1, 0)
    if count == 0:
        return f"none of {normals:,} held-out normal pictures is as strange"
    return f"{count:,} of {normals:,} held-out normal pictures {'is' if count == 1 else 'are'} as strange"


def combined_first(names: Iterable[str]) -> list[str]:
    """Names of scores in the order in which they are shown."""
    return sorted(names, key=lambda name: name != COMBINATION)


def embedded(image: Image.Image) -> report.Sheet:
    """A picture as an address that holds it, without loss where it is small."""
    small = max(image.size) <= _LOSSLESS
    if max(image.size) > _LONGEST:
        image = image.copy()
        image.thumbnail((_LONGEST, _LONGEST))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=small, quality=75)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return report.Sheet(uri, *image.size)


def template(name: str) -> jinja2.Template:
    """A template beside this file, with the words and numbers of the report."""
    environment = report.environment()
    environment.loader = jinja2.ChoiceLoader([jinja2.FileSystemLoader(_HERE), environment.loader])
    return environment.get_template(name)


@functools.cache
def macros() -> Any:
    """The macros `listed(rows, mark)` and `legend(HEAT)`, for other pages."""
    return template("anomaly_rows.html.jinja").module
