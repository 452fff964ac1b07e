"""The one gate by which any picture file enters: training, cache, check and demo. It needs no torch."""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from calotype import containers
from calotype.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")
MAX_PIXELS = 178_000_000  # just under Pillow's own refusal, which stays in force
_STRANGERS = {  # what often hides behind a picture's name, by its first bytes
    b"\x00\x05\x16\x07": "macOS metadata (AppleDouble), not a picture; delete it",
    b"version https://git-lfs": "a Git LFS pointer, not a picture; run `git lfs pull`",
    b"<": "HTML or XML text, not a picture; fetch the picture again",
}
_LARGE = 16_000_000  # pixels, above which a picture must not be packed more tightly than
_PIXELS_PER_BYTE = 300  # so; photographs hold 1 to 20 in a byte, one colour in a PNG 344
_DRAFT = 512


class UnreadableImage(UserError):
    """A picture that cannot be used: one line with the name of the file and the reason."""


class Header(NamedTuple):
    """What a file says of its picture: (width, height), format, Pillow's mode, and whether it moves."""

    size: tuple[int, int]
    format: str
    mode: str
    animated: bool


def load_image(
    source: str | os.PathLike | BinaryIO,
    *,
    channels: Literal[1, 3],
    draft_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = FORMATS,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """The first frame of a picture, upright and opaque, as 8-bit "L" or "RGB"; raises UnreadableImage.

    16-bit samples are scaled by 65535; floats, and integers beyond 16 bits, by their own range. With `draft_size` a
    large JPEG is decoded at a fraction of its size, its short side no shorter than that.
    """
    with _named(source), _binary_file(source) as file:
        image = _open(file, max_pixels, formats)
        return _to_mode(_decode(image, draft_size), "L" if channels == 1 else "RGB", background)


def inspect(source: str | os.PathLike | BinaryIO, *, decode: bool = False, max_pixels: int = MAX_PIXELS) -> Header:
    """What the header says of a picture that `load_image` can read; raises UnreadableImage.

    Pixels are decoded only if the end of the file is not where it should be, or with `decode`: damage in the middle of
    a file is found by that alone.
    """
    with _named(source), _binary_file(source) as file:
        image = _open(file, max_pixels)
        header = Header(image.size, image.format or "", image.mode, containers.moves(file, image))
        if decode or image.mode == "F" or not containers.is_whole(file, image):
            _to_mode(_decode(image, _DRAFT), "RGB", (255, 255, 255))
        return header


def display_name(source) -> str:
    """The name of a file on one line, whatever it consists of."""
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "the picture")
    name = str(name)
    return name if name.isprintable() else repr(name)


@contextlib.contextmanager
def _named(source) -> Iterator[None]:
    """Turn whatever is wrong with a picture into one line that begins with its name."""
    try:
        yield
    except UnreadableImage as error:
        raise UnreadableImage(f"{display_name(source)}: {error}") from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"{display_name(source)}: damaged ({reason})") from error


def _binary_file(source: str | os.PathLike | BinaryIO):
    if hasattr(source, "read"):
        return contextlib.nullcontext(source)
    try:
        mode = os.stat(source).st_mode
        if stat.S_ISREG(mode):  # opening a pipe would wait for ever
            return open(source, "rb")
    except (OSError, ValueError) as error:
        nothing = isinstance(error, FileNotFoundError) and os.path.islink(source)
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableImage("a link to nothing" if nothing else reason) from None
    raise UnreadableImage("a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file")


def _open(file: BinaryIO, max_pixels: int, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    _refuse(containers.fault_before_opening(file))
    try:
        image = Image.open(file, formats=formats)  # reads the header only
    except UnidentifiedImageError:
        raise UnreadableImage(_why_not_a_picture(file, formats)) from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(str(error)) from None
    pixels, size = image.width * image.height, containers.size_of(file)
    if pixels > max_pixels:
        raise UnreadableImage(f"{image.width} x {image.height} pixels are more than the limit of {max_pixels:,}")
    if pixels > _LARGE and pixels > _PIXELS_PER_BYTE * size:
        raise UnreadableImage(f"{pixels:,} pixels out of {size:,} bytes: a decompression bomb")
    _refuse(containers.fault_before_decoding(file, image))
    return image


def _decode(image: Image.Image, draft_size: int | None) -> Image.Image:
    """The picture itself, upright."""
    if draft_size is not None:
        image.draft(None, (draft_size, draft_size))
    image.load()
    with contextlib.suppress(Exception):  # a good picture with damaged EXIF data has no orientation to obey
        containers.drop_hostile_exif(image)
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _refuse(fault: str | None) -> None:
    if fault:
        raise UnreadableImage(fault)


def _why_not_a_picture(file: BinaryIO, formats: tuple[str, ...]) -> str:
    file.seek(0)
    start = file.read(256)
    if not start:
        return "an empty file"
    for prefix, reason in _STRANGERS.items():
        if start.lstrip().startswith(prefix):
            return reason
    if start[4:10] == b"ftyphe":
        return "a HEIC picture; convert it to JPEG or PNG"
    return f"damaged, or not one of {', '.join(formats)}"


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
