"""The one gate by which any picture enters: training, cache and demo; and the way back to pictures and sheets."""

import contextlib
import os
import stat
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from calotype.errors import UserError

Fit = Literal["crop", "pad", "stretch"]

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")
MAX_PIXELS = 178_000_000  # just under Pillow's own refusal, which stays in force
_STRANGERS = {  # what often hides behind a picture's name, by its first bytes
    b"\x00\x05\x16\x07": "macOS metadata (AppleDouble), not a picture; delete it",
    b"version https://git-lfs": "a Git LFS pointer, not a picture; run `git lfs pull`",
    b"<": "HTML or XML text, not a picture; fetch the picture again",
}
_GAP = 2
_INK = (60, 60, 60)


class UnreadableImage(UserError):
    """A picture that cannot be used: one line with the name of the file and the reason."""


def load_image(
    source: str | os.PathLike | BinaryIO,
    *,
    channels: Literal[1, 3],
    draft_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """The first frame of a picture, upright and opaque, as 8-bit "L" or "RGB"; raises UnreadableImage.

    16-bit samples are scaled by 65535; floats, and integers beyond 16 bits, by their own range. With `draft_size` a
    large JPEG is decoded at a fraction of its size, its short side no shorter than that.
    """
    try:
        with _binary_file(source) as file:
            image = _open(file, max_pixels)
            if draft_size is not None:
                image.draft(None, (draft_size, draft_size))
            image.load()
            with contextlib.suppress(Exception):  # a good picture with damaged EXIF data has no orientation to obey
                ImageOps.exif_transpose(image, in_place=True)
            return _to_mode(image, "L" if channels == 1 else "RGB", background)
    except UnreadableImage as error:
        raise UnreadableImage(f"{_display_name(source)}: {error}") from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"{_display_name(source)}: damaged ({reason})") from error


def header_size(source: str | os.PathLike) -> tuple[int, int]:
    """(width, height) that the header of a readable picture gives, whatever is decoded of it."""
    with Image.open(source, formats=FORMATS) as image:
        return image.size


def _binary_file(source: str | os.PathLike | BinaryIO):
    if hasattr(source, "read"):
        return contextlib.nullcontext(source)
    try:
        mode = os.stat(source).st_mode
        if stat.S_ISREG(mode):  # opening a pipe would wait for ever
            return open(source, "rb")
    except OSError as error:
        nothing = isinstance(error, FileNotFoundError) and os.path.islink(source)
        raise UnreadableImage("a link to nothing" if nothing else error.strerror) from None
    raise UnreadableImage("a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file")


def _open(file: BinaryIO, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)  # reads the header only
    except UnidentifiedImageError:
        raise UnreadableImage(_why_not_a_picture(file)) from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(str(error)) from None
    if image.width * image.height > max_pixels:
        raise UnreadableImage(f"{image.width} x {image.height} pixels are more than the limit of {max_pixels:,}")
    return image


def _why_not_a_picture(file: BinaryIO) -> str:
    file.seek(0)
    start = file.read(256)
    if not start:
        return "an empty file"
    for prefix, reason in _STRANGERS.items():
        if start.lstrip().startswith(prefix):
            return reason
    if start[4:10] == b"ftyphe":
        return "a HEIC picture; convert it to JPEG or PNG"
    return f"damaged, or not one of {', '.join(FORMATS)}"


def _display_name(source) -> str:
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "the picture")
    name = str(name)
    return name if name.isprintable() else repr(name)


def _to_mode(image: Image.Image, mode: str, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        backdrop = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(backdrop, image.convert("RGBA"))
    if image.mode not in ("1", "L"):  # Pillow has no direct way from some modes (LAB, CMYK) to "L"
        image = image.convert("RGB")
    return image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 or 32 bits as "L", or "LA" where a level is declared transparent; nothing is ever clipped."""
    x = np.asarray(image)
    if not np.isfinite(x).all():
        raise UnreadableImage("holds values that are not finite")
    low, high = float(x.min()), float(x.max())
    if x.dtype.kind != "f" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    unit = (x.astype(np.float32) - low) / max(high - low, np.finfo(np.float32).tiny)
    levels = Image.fromarray(np.rint(unit * 255).astype(np.uint8))
    if "transparency" in image.info:
        levels.putalpha(Image.fromarray(np.where(x == image.info["transparency"], 0, 255).astype(np.uint8)))
    return levels


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
    return transforms.resize(image, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


def _crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    # Cropped before it is resized: a very long strip would otherwise become gigantic on the way.
    scale = max(size[0] / image.height, size[1] / image.width)
    box = [max(1, round(side / scale)) for side in size]
    return _resize(transforms.center_crop(image, box), size)


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
    return transforms.pil_to_tensor(image)


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """A picture from uint8 pixels (C, H, W) with one or three channels."""
    return transforms.to_pil_image(pixels.cpu())


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


def _caption(draw: ImageDraw.ImageDraw, text: str, at: tuple[float, float], anchor: str, width: int, font) -> None:
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text = text.rstrip() + "…"
    draw.text(at, text, _INK, font, anchor)
