"""The embedded data set: captioned pictures of coloured shapes whose factors are known, made by arithmetic alone.

Picture `index` of `seed` is always the same and needs no file; the index has no upper end.
"""

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from calotype.randomness import numpy_generator

COLOURS = {  # at least 45 apart in CIE Lab, and 40 from every background, so that a model's blur confuses none
    "red": (210, 28, 44),
    "orange": (255, 146, 0),
    "yellow": (252, 224, 24),
    "green": (30, 146, 58),
    "cyan": (0, 190, 212),
    "blue": (35, 70, 215),
    "magenta": (208, 54, 190),
    "black": (26, 26, 32),
}
BACKGROUNDS = {
    "white": (248, 248, 248),
    "sand": (228, 217, 192),
    "lavender": (222, 213, 244),
    "grey": (202, 202, 205),
    "rose": (246, 214, 220),
    "peach": (250, 222, 196),
    "mint": (205, 236, 214),
    "sky": (208, 226, 246),
}
SIZES = {"small": 0.20, "medium": 0.29, "large": 0.38}  # radius of the smallest circle around a star, in picture sides
_MIDDLE = 0.07  # how far a centre may lie off the middle and still be called so


def _regular(corners: int, radius: float, turn: float = 0.0) -> np.ndarray:
    return radius * np.exp(1j * (2 * np.pi * np.arange(corners) / corners + turn))


def _star() -> np.ndarray:
    return _regular(10, 1, np.pi / 2) * np.tile([1, 0.45], 5)


def _heart() -> np.ndarray:
    t = 2 * np.pi * np.arange(64) / 64
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return _centred(x + 1j * y) * 0.055


def _cross() -> np.ndarray:
    arm, half = 0.92, 0.31
    corner = np.array([arm + 1j * half, half + 1j * half, half + 1j * arm])
    return np.concatenate([corner * 1j**k for k in range(4)])


def _centred(outline: np.ndarray) -> np.ndarray:
    """The outline about the centre of its area (shoelace formula)."""
    following = np.roll(outline, -1)
    area = (outline.conj() * following).imag
    return outline - ((outline + following) * area).sum() / (3 * area.sum())


_OUTLINES = {  # complex numbers, y upwards, about the centre of the area, at most 1 from it; much the same to the eye
    "circle": _regular(64, 0.78),
    "square": _regular(4, 0.95, np.pi / 4),
    "triangle": _regular(3, 1, np.pi / 2),
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(),
}
SHAPES = tuple(_OUTLINES)
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class Factors:
    """What is in one picture; x and y in [0, 1] from the top left, rotation in degrees anticlockwise."""

    shape: str
    colour: str
    size: str
    background: str
    x: float
    y: float
    rotation: float

    @property
    def name(self) -> str:
        """The class, for instance "red star"."""
        return f"{self.colour} {self.shape}"

    @property
    def label(self) -> int:
        """The place of the class in CLASSES, 0 to 47."""
        return CLASSES.index(self.name)

    @property
    def caption(self) -> str:
        """A sentence, for instance "a large red star at the top left"."""
        vertical = _side(self.y, "top", "bottom")
        horizontal = _side(self.x, "left", "right")
        place = " ".join(filter(None, (vertical, horizontal)))
        return f"a {self.size} {self.name} {f'at the {place}' if place else 'in the middle'}"


def _side(position: float, before: str, after: str) -> str:
    if abs(position - 0.5) <= _MIDDLE:
        return ""
    return before if position < 0.5 else after


@dataclass(frozen=True)
class Variation:
    """How far the factors vary; `jitter` bounds |x - 1/2| and |y - 1/2| where the shape would still be all inside."""

    sizes: tuple[str, ...]
    backgrounds: tuple[str, ...]
    jitter: float
    rotation: float


PLAIN = Variation(("medium", "large"), ("white", "sand", "lavender"), jitter=0.06, rotation=15)
FULL = Variation(tuple(SIZES), tuple(BACKGROUNDS), jitter=0.5, rotation=180)


def draw_factors(seed: int, index: int, variation: Variation = PLAIN) -> Factors:
    """The factors of picture `index`; indices 48 k to 48 k + 47 hold every class once, in an order of their own."""
    block, place = divmod(index, len(CLASSES))
    colour, shape = CLASSES[_class_order(seed, block)[place]].split()
    u = numpy_generator(seed, "shapes", index).random(5).tolist()
    size = variation.sizes[int(u[0] * len(variation.sizes))]
    reach = min(variation.jitter, 0.49 - SIZES[size])
    return Factors(
        shape=shape,
        colour=colour,
        size=size,
        background=variation.backgrounds[int(u[1] * len(variation.backgrounds))],
        x=0.5 + reach * (2 * u[2] - 1),
        y=0.5 + reach * (2 * u[3] - 1),
        rotation=variation.rotation * (2 * u[4] - 1),
    )


@functools.lru_cache(maxsize=4096)
def _class_order(seed: int, block: int) -> tuple[int, ...]:
    # Not index % 48: a data set that is split by every n-th index would then lose whole classes.
    return tuple(numpy_generator(seed, "shapes/classes", block).permutation(len(CLASSES)).tolist())


def render(factors: Factors, size: tuple[int, int]) -> Image.Image:
    """An anti-aliased RGB picture (height, width) of the factors; the shorter side measures the shape."""
    height, width = size
    fine = 8 if min(size) <= 256 else 4
    turn = np.exp(-1j * np.deg2rad(factors.rotation))  # with the conjugate: y points downwards in a picture
    outline = _OUTLINES[factors.shape].conj() * turn * SIZES[factors.size] * min(size)
    points = (outline + complex(factors.x * width, factors.y * height)) * fine - (0.5 + 0.5j)  # to pixel centres
    mask = Image.new("L", (width * fine, height * fine))
    ImageDraw.Draw(mask).polygon(points.view(np.float64).tolist(), fill=255)
    image = Image.new("RGB", (width, height), BACKGROUNDS[factors.background])
    image.paste(COLOURS[factors.colour], mask=mask.reduce(fine))
    return image
