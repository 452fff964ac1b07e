"""What the container of a picture tells without decoding: what hides in it, and whether its end is there.

Pillow limits the pixels of a picture. A small file can unpack to far more than those: tables of tags whose entries all
point at the same bytes, compressed texts, endless comments, scans and tiles. The walks here go where Pillow goes.
"""

import contextlib
import io
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image, JpegImagePlugin

_MOST_TAGS = 4096  # in one table; cameras write a few dozen
_MOST_TEXT = 12 * 2**20  # bytes of compressed texts, as Pillow counts them
_MOST_COMMENTS = 2**20  # bytes; Pillow's time grows with their square
_MOST_SCANS = 50  # of a progressive JPEG; encoders write a dozen, and each one walks over the whole picture
_MOST_TILE = 16_000_000  # pixels
_FRAME, _COMMENT = 0x2C, 0xFE  # kinds of blocks in a GIF
_UNIT = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_STARTS = (b"II", b"MM")
_WITHOUT_LENGTH = {code & 0xFF for code, (_, _, handler) in JpegImagePlugin.MARKER.items() if handler is None}


def fault_before_opening(file: BinaryIO) -> str | None:
    """Why Pillow must not even open the file, or None; the file stands at its start afterwards."""
    file.seek(0)
    start = file.read(8)
    try:
        if start.startswith(b"\xff\xd8"):
            return _fault_of_jpeg(file)
        if start == b"\x89PNG\r\n\x1a\n":
            return _fault_of_png(file)
        if start.startswith(b"GIF8"):
            return _fault_of_gif(file)
        if start.startswith(_TIFF_STARTS):
            return _fault_of_table(file, size_of(file))
    except (struct.error, IndexError, OverflowError, OSError):
        pass  # damaged: Pillow will say where
    finally:
        file.seek(0)
    return None


def fault_before_decoding(file: BinaryIO, image: Image.Image) -> str | None:
    """Why an opened picture must not be decoded although it is not too large, or None."""
    if image.info.get("progressive"):
        scans = _count(file, b"\xff\xda")
        if scans > _MOST_SCANS:
            return f"{scans:,} scans, more than {_MOST_SCANS}: a decompression bomb"
    tags = getattr(image, "tag_v2", {})
    tile = int(tags.get(322, 0)) * int(tags.get(323, 0))
    if tile > max(_MOST_TILE, 2 * image.width * image.height):
        return f"tiles of {tile:,} pixels in a picture of {image.width} x {image.height}: a decompression bomb"
    return None


def drop_hostile_exif(image: Image.Image) -> None:
    """Remove EXIF data whose table unpacks to far more than it holds, before anything reads an orientation from it."""
    exif = image.info.get("exif")
    if exif is None and "Raw profile type exif" in image.info:  # as ImageMagick writes it, in hexadecimal
        exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
    if exif and _fault_of_exif(exif):
        image.info.pop("exif", None)
        image.info.pop("Raw profile type exif", None)


def size_of(file: BinaryIO) -> int:
    """Bytes of a file; leaves it where it stands."""
    here = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(here)
    return end


def is_whole(file: BinaryIO, image: Image.Image) -> bool:
    """Whether the end of the file is where its format wants it; False where only decoding can tell."""
    size = size_of(file)
    file.seek(max(0, size - 12))
    end = file.read(12)
    match image.format:
        case "JPEG" | "MPO":
            return end.endswith(b"\xff\xd9")
        case "PNG":
            return end == b"\0\0\0\0IEND\xaeB`\x82"
        case "GIF":
            return end.endswith(b";")
        case "WEBP":
            return _number(file, 4, "<I") + 8 <= size
        case "BMP":
            return 0 < _number(file, 2, "<I") <= size
        case "TIFF":
            return _strips_end(image.tag_v2) <= size
    return False


def moves(file: BinaryIO, image: Image.Image) -> bool:
    """Whether there is more than one frame or page; the second picture in a camera's JPEG is neither."""
    if image.format != "GIF":
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    here, frames = file.tell(), 0
    with contextlib.suppress(IndexError):  # cut off
        for kind, _ in _gif_blocks(file):
            frames += kind == _FRAME
            if frames > 1:
                break
    file.seek(here)
    return frames > 1


# Each format


def _fault_of_jpeg(file: BinaryIO) -> str | None:
    """The tables of EXIF and of several pictures in one; Pillow joins all EXIF segments before the first scan."""
    exif = b""
    for kind, content in _segments(file):
        if kind == 0xE1 and content.startswith(b"Exif\0\0"):
            exif += content[6:]
        if kind == 0xE2 and content.startswith(b"MPF\0") and (fault := _fault_of_exif(content[4:])):
            return fault
    return _fault_of_exif(exif)


def _segments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    file.seek(2)
    while byte := file.read(1):
        if byte != b"\xff":
            continue
        kind = (file.read(1) or b"\xda")[0]
        if kind == 0xFF:
            file.seek(-1, os.SEEK_CUR)
        elif kind == 0xDA:
            return
        elif kind and kind not in _WITHOUT_LENGTH:
            (length,) = struct.unpack(">H", file.read(2))
            yield kind, file.read(length - 2) if length > 2 else b""


def _fault_of_png(file: BinaryIO) -> str | None:
    """Texts may be compressed a thousandfold; and every chunk costs time, however small."""
    text = chunks = 0
    size = size_of(file)
    while header := file.read(8):
        length, kind = struct.unpack(">I4s", header)
        chunks += 1
        if kind in (b"zTXt", b"iTXt"):
            text += min(2**20, 1032 * length)  # Pillow refuses more than 1 MiB of one text, zlib packs no tighter
        if text > _MOST_TEXT:
            return "compressed texts beyond any caption: a decompression bomb"
        if chunks > 1000 + size // 1024:
            return f"more than {chunks:,} chunks in {size:,} bytes; not made by any sane program"
        file.seek(length + 4, os.SEEK_CUR)
    return None


def _fault_of_gif(file: BinaryIO) -> str | None:
    comments = 0
    for kind, length in _gif_blocks(file):
        comments += length if kind == _COMMENT else 0
        if comments > _MOST_COMMENTS:
            return f"more than {_MOST_COMMENTS:,} bytes of comments; not made by any sane program"
        if kind == _FRAME:
            break
    return None


def _gif_blocks(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Kind and length of every block of a GIF; a frame announces itself with length 0 before its data."""
    file.seek(10)
    _skip_palette(file, file.read(3)[0])
    while (byte := file.read(1)) and byte != b";":
        if byte == b",":
            yield _FRAME, 0
            _skip_palette(file, file.read(9)[8])
            file.seek(1, os.SEEK_CUR)
        elif byte != b"!":
            continue
        kind = _FRAME if byte == b"," else file.read(1)[0]
        while length := (file.read(1) or b"\0")[0]:
            file.seek(length, os.SEEK_CUR)
            if kind != _FRAME:
                yield kind, length


def _skip_palette(file: BinaryIO, flags: int) -> None:
    file.seek(3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0, os.SEEK_CUR)


def _fault_of_exif(exif: bytes) -> str | None:
    exif = exif.removeprefix(b"Exif\0\0")
    return _fault_of_table(io.BytesIO(exif), 2 * len(exif))


def _fault_of_table(file: BinaryIO, most: int) -> str | None:
    """The first table of a TIFF structure must not ask for more than `most` bytes: entries can share theirs."""
    file.seek(0)
    head = file.read(16)
    order, wide = "<" if head[:2] == b"II" else ">", head[2:3] == b"\x2b"
    if len(head) < 8:
        return None
    file.seek(struct.unpack(order + "Q", head[8:16])[0] if wide else struct.unpack(order + "I", head[4:8])[0])
    (count,) = struct.unpack(order + "Q", file.read(8)) if wide else struct.unpack(order + "H", file.read(2))
    if count > _MOST_TAGS:
        return f"{count:,} tags in one table; not made by any sane program"
    entry = struct.Struct(order + ("HHQ8x" if wide else "HHI4x"))
    table = file.read(count * entry.size)
    whole = table[: len(table) // entry.size * entry.size]
    total = sum(_UNIT.get(kind, 0) * n for _, kind, n in entry.iter_unpack(whole))
    if total > most + 2**16:
        return f"tags of {total:,} bytes in a file of fewer: a decompression bomb, or damaged"
    return None


def _strips_end(tags) -> float:
    starts, lengths = tags.get(273) or tags.get(324), tags.get(279) or tags.get(325)
    if not starts or not lengths:
        return float("inf")
    return max(start + length for start, length in zip(starts, lengths, strict=False))


def _number(file: BinaryIO, offset: int, layout: str) -> int:
    file.seek(offset)
    return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]


def _count(file: BinaryIO, word: bytes) -> int:
    here = file.tell()
    file.seek(0)
    found = file.read().count(word)
    file.seek(here)
    return found
