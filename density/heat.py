"""Heat-maps: how strange each place of a picture is, in colours over the picture in grey."""

import functools
import math

import numpy as np
from PIL import Image
from torch import Tensor

MOST = 16  # times the usual, from which on a place has the last colour
_SHADES = 256
_OPACITY = 0.92  # of the last colour
_LIGHTNESS, _CHROMA, _HUE = (0.42, 0.93), 0.17, (0.0, 105.0)  # of the first and last colour, in OKLCh
# From OKLab to the cube roots of cone responses, and from these to linear sRGB (Ottosson 2020).
_CONES = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.291485548]]
)
_LINEAR = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.707614701],
    ]
)


def overlay(pixels: Tensor, strangeness: Tensor) -> Image.Image:
    """The picture (C, H, W), uint8, in grey under the colours of its map (H, W): 1 usual and clear, MOST opaque."""
    grey = pixels.float().mean(0).cpu().numpy()[..., None] * 0.55 + 50  # on black and on white colours would drown
    shares = share(strangeness.double().cpu().numpy())
    opacity = _OPACITY * np.sqrt(shares)[..., None]
    mixed = (1 - opacity) * grey + opacity * ramp()[np.rint(shares * (_SHADES - 1)).astype(int)]
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def share(strangeness: np.ndarray) -> np.ndarray:
    """Where "so many times the usual" lies between 1 and MOST, from 0 to 1: each doubling is the same step."""
    return np.log2(np.clip(np.nan_to_num(strangeness, nan=MOST), 1, MOST)) / math.log2(MOST)


@functools.cache
def ramp() -> np.ndarray:
    """Colours (_SHADES, 3) in 0 to 255, from plum over red and orange to pale yellow, in steps that look even."""
    lab = _path(np.linspace(0, 1, 4096))
    walked = np.concatenate([[0], np.linalg.norm(np.diff(lab, axis=0), axis=1).cumsum()])
    even = np.interp(np.linspace(0, walked[-1], _SHADES), walked, np.linspace(0, 1, len(lab)))
    linear = np.clip((_path(even) @ _CONES.T) ** 3 @ _LINEAR.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _path(at: np.ndarray) -> np.ndarray:
    """Places (n, 3) in OKLab on the way from the first colour (0) to the last (1)."""
    light, hue = (low + (high - low) * at for low, high in (_LIGHTNESS, np.radians(_HUE)))
    chroma = _CHROMA * (1 - (at - 0.45) ** 2)
    return np.stack([light, chroma * np.cos(hue), chroma * np.sin(hue)], -1)


def gradient() -> str:
    """The ramp as the stops of a CSS gradient."""
    picked = ramp()[np.linspace(0, _SHADES - 1, 12).round().astype(int)]
    return ", ".join("#{:02x}{:02x}{:02x}".format(*colour.round().astype(int)) for colour in picked)
