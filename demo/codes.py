"""What a code looks like, and how far a copy is from its picture."""

import math

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor

ERROR_RANGE = 64  # levels of 255 from which on the error map is white
CODE_RANGE = 3.0  # standard deviations from which on a tile has its full colour
MOST_TILES = 64
_HEAT = ("15120e", "6d3812", "c8722f", "f0cba6", "fffdf8")
_SIGNED = ("123f5c", "6fa3c4", "faf7f0", "d9935a", "6d3812")


def psnr(a: Image.Image, b: Image.Image) -> float:
    """The peak signal-to-noise ratio of two 8-bit pictures in dB; infinite for equal ones."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def error_map(a: Image.Image, b: Image.Image) -> Image.Image:
    """The mean absolute difference over channels, from black for none to white at ERROR_RANGE levels."""
    difference = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32))
    return _coloured(difference.reshape(a.height, a.width, -1).mean(-1) / ERROR_RANGE, _HEAT)


def code_tiles(z: Tensor) -> Image.Image:
    """Channels of a code z (c, h, w) as tiles, blue below zero and brown above; at most MOST_TILES of them."""
    values = z[:MOST_TILES].float().cpu().numpy() / (2 * CODE_RANGE) + 0.5
    if z[0].numel() == 1:  # a whole picture in one column of numbers: a tile would be a single pixel
        return _coloured(values.reshape(1, -1), _SIGNED)
    count, height, width = values.shape
    columns = math.ceil(math.sqrt(count))
    gap = max(1, height // 8)
    sheet = Image.new("RGBA", (columns * (width + gap) - gap, math.ceil(count / columns) * (height + gap) - gap))
    for i, channel in enumerate(values):
        at = (i % columns * (width + gap), i // columns * (height + gap))
        sheet.paste(_coloured(channel, _SIGNED), at)
    return sheet


def token_map(vae: VQModel, z: Tensor) -> tuple[Image.Image, int]:
    """The code of each place (h, w) in a colour of its own, codes that are alike in like colours; how many differ."""
    with torch.no_grad():
        numbers = vae.quantize(z[None].to(vae.device, vae.dtype))[2][2].reshape(z.shape[1:]).cpu()
    colours = _code_colours(vae.quantize.embedding.weight.detach().float().cpu())
    return Image.fromarray(colours[numbers.numpy()]), len(numbers.unique())


def _code_colours(codes: Tensor) -> np.ndarray:
    """A colour (n, 3) for each code (n, c): where it ranks along the codebook's leading directions."""
    centred = codes - codes.mean(0)
    *_, directions = torch.linalg.svd(centred, full_matrices=False)
    ranks = (centred @ directions[:3].T).argsort(0).argsort(0) / max(len(codes) - 1, 1)
    colours = torch.cat([ranks, ranks.new_full((len(codes), 3), 0.5)], dim=1)[:, :3]
    return (40 + 200 * colours).round().byte().numpy()


def _coloured(shares: np.ndarray, ramp: tuple[str, ...]) -> Image.Image:
    """Numbers (h, w) from 0 to 1 as colours between those of a ramp."""
    stops = np.array([[int(colour[i : i + 2], 16) for i in (0, 2, 4)] for colour in ramp], np.float32)
    at = np.linspace(0, 1, len(ramp))
    channels = [np.interp(shares, at, stops[:, i]) for i in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))
