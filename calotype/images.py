"""Pictures as tensors, and the way back to pictures and sheets; files come in through `picture_files`."""

from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from calotype.picture_files import MAX_PIXELS as MAX_PIXELS
from calotype.picture_files import UnreadableImage as UnreadableImage
from calotype.picture_files import load_image as load_image

Fit = Literal["crop", "pad", "stretch"]

SHEET = 4, 12  # rows and columns of a sheet of samples
_GAP = 2
_INK = (60, 60, 60)


def draft_for(size: tuple[int, int]) -> int:
    """The side down to which a JPEG may be decoded small for pictures of (height, width).

    One and a half times the longer one: what is decoded at hardly more than its final size has been averaged over
    blocks, which is some decibels further from a careful reduction.
    """
    return 3 * max(size) // 2


def fit_image(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """The picture at (height, width): its centre ("crop"), all of it on a border ("pad"), or out of shape ("stretch").

    "pad" never enlarges: a 28 x 28 digit keeps its pixels in 32 x 32. The border takes the median colour of the
    picture's edge, so that no frame appears: black round a digit, white round a product shot.
    """
    if image.size == (size[1], size[0]):
        return image
    if fit == "stretch":
        return _resize(image, size)
    return _crop(image, size) if fit == "crop" else _pad(image, size)


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    # Cropped before it is resized: a very long strip would otherwise become gigantic on the way.
    scale = max(size[0] / image.height, size[1] / image.width)
    height, width = (max(1, round(side / scale)) for side in size)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return _resize(image.crop((left, top, left + width, top + height)), size)


def _pad(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    scale = min(size[0] / image.height, size[1] / image.width)
    if scale < 1:
        image = _resize(image, (max(1, round(image.height * scale)), max(1, round(image.width * scale))))
    left, top = (size[1] - image.width) // 2, (size[0] - image.height) // 2
    canvas = Image.new(image.mode, (size[1], size[0]), _edge_colour(image))
    canvas.paste(image, (left, top))
    return canvas


def _edge_colour(image: Image.Image) -> tuple[int, ...]:
    x = np.asarray(image).reshape(image.height, image.width, -1)
    edge = np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])
    return tuple(int(level) for level in np.median(edge, axis=0))


def to_uint8(image: Image.Image) -> torch.Tensor:
    """The pixels of a picture as uint8 (C, H, W)."""
    x = torch.from_numpy(np.array(image))
    return x.view(image.height, image.width, -1).permute(2, 0, 1)


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """A picture from uint8 pixels (C, H, W) with one or three channels."""
    x = pixels.cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(x[..., 0] if x.shape[2] == 1 else x)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels from uint8 in [0, 255] to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def denormalize(x: torch.Tensor) -> torch.Tensor:
    """Pixels from floats in [-1, 1] to uint8 in [0, 255], rounded and clamped."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def image_grid(
    images: torch.Tensor,
    columns: int,
    labels: list[str] | None = None,
    *,
    row_labels: list[str] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """A white sheet of uint8 pictures (N, C, H, W) in rows, small ones enlarged by a whole `scale`, with captions."""
    height, width = images.shape[-2:]
    scale = scale or max(1, 96 // max(height, width))
    tile_height, tile_width = height * scale, width * scale
    font = ImageFont.load_default(min(14, max(9, tile_width // 7)))
    line = sum(font.getmetrics()) + 1
    left = max((round(font.getlength(label)) + 4 * _GAP for label in row_labels or []), default=_GAP)
    top = _GAP
    pitch_x, pitch_y = tile_width + _GAP, tile_height + _GAP + (line if labels else 0)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (left + columns * pitch_x, top + rows * pitch_y), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)

    for i, pixels in enumerate(images):
        x, y = left + i % columns * pitch_x, top + i // columns * pitch_y
        tile = to_pil(pixels).convert("RGB")
        sheet.paste(tile.resize((tile_width, tile_height), Image.Resampling.NEAREST), (x, y))
        if labels:
            _caption(draw, labels[i], (x + tile_width / 2, y + tile_height + line / 2), "mm", tile_width, font)
    for i, label in enumerate(row_labels or []):
        draw.text((left - 2 * _GAP, top + i * pitch_y + tile_height / 2), label, _INK, font, "rm")
    return sheet


def sheet_labels(class_names: list[str], count: int) -> list[int] | None:
    """Labels of a sample sheet: a column a class while they fit, else spread over all classes."""
    if len(class_names) > SHEET[1]:
        return [i * len(class_names) // count for i in range(count)]
    return [i % SHEET[1] % len(class_names) for i in range(count)] if class_names else None


def _caption(draw: ImageDraw.ImageDraw, text: str, at: tuple[float, float], anchor: str, width: int, font) -> None:
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text = text.rstrip() + "…"
    draw.text(at, text, _INK, font, anchor)
