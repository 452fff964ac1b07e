"""Picture files that mean harm, or met with some: made on the spot, each with the verdict that the gate must give."""

import io
import os
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 24


class Case(NamedTuple):
    """A file's content and what must be said of it: None for a good one. `deep`: only decoding can find it."""

    data: bytes
    fault: str | None = None
    deep: bool = False


def gradient(height=SIDE, width=40):
    """RGB pixels (H, W, 3) without two equal neighbours."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], axis=-1).astype(np.uint8)


def saved(fmt, image=None, **options):
    """A picture as bytes."""
    stream = io.BytesIO()
    (image or Image.fromarray(gradient())).save(stream, fmt, **options)
    return stream.getvalue()


def picture(file, colour=(200, 30, 30)):
    """A small PNG of one colour, whatever its name says, and the folders it lies in."""
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "wb") as stream:
        stream.write(saved("PNG", Image.new("RGB", (12, 8), colour)))
    return file


# PNG, TIFF, EXIF by hand


def chunk(kind, data):
    """A chunk of a PNG with its right sum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width=4, height=4, *, pixels=None, more=b"", kind=2, bits=8):
    """A PNG whose header says what it is told to; `pixels` are compressed as they are."""
    rows = bytes((1 + 3 * width) * height) if pixels is None else pixels
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def tags(entries, data, wide=False):
    """A TIFF structure: its table of (tag, type, count, value), then the data; a value of None is where that lies."""
    layout, head = ("<HHQQ", b"II+\0\x08\0\0\0" + struct.pack("<Q", 16)) if wide else ("<HHII", b"II*\0\x08\0\0\0")
    count = struct.pack("<Q" if wide else "<H", len(entries))
    start = len(head) + len(count) + len(entries) * struct.calcsize(layout) + (8 if wide else 4)
    table = b"".join(struct.pack(layout, t, k, n, start if v is None else v) for t, k, n, v in entries)
    return head + count + table + bytes(8 if wide else 4) + data


def shared_tags(count, size):
    """A table whose entries all claim the same bytes."""
    return tags([(1000 + i, 1, size, None) for i in range(count)], bytes(size))


def tiff(width, height, data, **more):
    """A deflated 8-bit TIFF; `more` are further tags, as t322=16."""
    given = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1} | {int(k[1:]): v for k, v in more.items()}
    places = {273: None, 279: len(data)} if 322 not in given else {324: None, 325: len(data)}
    return tags([(t, 4, 1, v) for t, v in sorted((given | places).items())], data)


def exif_segments(blob):
    """EXIF data over as many segments of a JPEG as it needs."""
    parts = [blob[i : i + 60_000] for i in range(0, len(blob), 60_000)]
    return b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts)


def in_jpeg(segments):
    """A JPEG with more segments at its start."""
    photo = saved("JPEG")
    return photo[:2] + segments + photo[2:]


# What unpacks to far more than it is: each must cost next to nothing


def bombs():
    """Bombs by name; all stay below 10 MB."""
    return {
        "pixels.png": Case(png(60_000, 60_000, pixels=bytes(3 * 10**6)), "60.*60|exceeds limit"),
        "below_the_limit.png": Case(solid_png(13_000), "out of .* bytes: a decompression bomb"),
        "one_bit.png": Case(png(13_300, 13_300, pixels=bytes(1663 * 13_300), kind=0, bits=1), "a decompression bomb"),
        "text.png": Case(png(more=_texts()), "compressed texts"),
        "profile.png": Case(png(more=chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(10**8)))), "damaged"),
        "chunks.png": Case(png(more=chunk(b"teSt", b"") * 200_000), "chunks"),
        "exif.png": Case(png(more=chunk(b"eXIf", shared_tags(3000, 200_000)))),  # without its EXIF it is a good picture
        "exif.webp": Case(saved("WEBP", exif=shared_tags(3000, 200_000))),
        "exif.jpg": Case(in_jpeg(exif_segments(shared_tags(3000, 200_000))), "decompression bomb"),
        "parts.jpg": Case(in_jpeg(_parts()), "decompression bomb"),
        "scans.jpg": Case(_scans(4000, 400), "scans"),
        "table.tif": Case(shared_tags(3000, 200_000), "decompression bomb"),
        "entries.tif": Case(tags([(i % 60_000, 3, 1, 1) for i in range(200_000)], b"", wide=True), "tags in one table"),
        "tile.tif": Case(tiff(16, 16, zlib.compress(bytes(16_000**2), 9), t322=16_000, t323=16_000), "tiles"),
        "strip.tif": Case(tiff(16_000, 4, zlib.compress(bytes(16_000**2), 9), t278=16_000)),  # only 4 rows count
        "pages.tif": Case(tiff(60_000, 60_000, zlib.compress(bytes(10**6))), "exceeds limit"),
        "screen.gif": Case(_screen(), "exceeds limit"),
        "solid.gif": Case(saved("GIF", Image.new("P", (13_000, 13_000))), "a decompression bomb"),
        "comments.gif": Case(_comments(4_000_000), "comments"),
        "canvas.webp": Case(_canvas(), "exceeds limit"),
        "solid.webp": Case(saved("WEBP", Image.new("RGB", (16_000, 11_000)), lossless=True, method=0), "bomb"),
        "header.bmp": Case(_bmp_header(90_000), "exceeds limit"),
        "header.ppm": Case(b"P6 99999 99999 255\n" + bytes(100), "exceeds limit"),
    }


def solid_png(side):
    """A square of one colour, packed as tightly as zlib can."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(3 * side + 1)) for _ in range(side)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _bmp_header(side):
    return b"BM" + struct.pack("<IIIIiiHHIIIIII", 0, 0, 54, 40, side, side, 1, 24, *[0] * 6)


def _texts():
    """60 texts of 1 MB; one character beyond the rest makes Python keep four bytes for each."""
    text = zlib.compress(("a" * 999_990 + "\U0001f600").encode(), 9)
    return b"".join(chunk(b"iTXt", b"k%d\0\1\0\0\0" % i + text) for i in range(60))


def _parts():
    blob = shared_tags(2500, 30_000)
    return b"\xff\xe2" + struct.pack(">H", len(blob) + 6) + b"MPF\0" + blob


def _scans(side, count):
    photo = saved("JPEG", Image.new("L", (side, side)), progressive=True)
    last = photo[photo.rindex(b"\xff\xda") : -2]
    return photo[:-2] + last * count + photo[-2:]


def _screen():
    """A frame that is larger than the screen."""
    data = bytearray(saved("GIF", Image.new("P", (8, 8))))
    frame = data.index(b"\x2c", 13)
    data[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)
    return bytes(data)


def _comments(size):
    data = saved("GIF", Image.new("P", (8, 8)))
    head = 13 + (3 * 2 ** ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    return data[:head] + b"\x21\xfe" + (b"\xff" + bytes(255)) * (size // 256) + b"\0" + data[head:]


def _canvas():
    frames = [Image.new("RGB", (500, 500), (i, 0, 0)) for i in range(8)]
    data = bytearray(saved("WEBP", frames[0], save_all=True, append_images=frames[1:]))
    data[24:30] = (16_382).to_bytes(3, "little") * 2
    return bytes(data)


# Damaged, mistaken, and good ones


def strangers():
    """What is not a picture at all."""
    texts = {
        "empty.png": (b"", "empty file"),
        "page.jpg": (b"\n<!DOCTYPE html><html>404</html>", "HTML"),
        "page_bom.jpg": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "HTML or XML"),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "XML"),
        "notes.jpg": (b"just some text", "not one of"),
        "utf16.jpg": ("some text".encode("utf-16"), "not one of"),
        "zeros.jpg": (bytes(5000), "not one of"),
        "noise.png": (np.random.default_rng(0).bytes(4000), "not one of"),
        "photo.jpg": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "AppleDouble"),
        "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        "phone.jpg": (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "HEIC"),
        "page.tif": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not one of"),
        "paper.png": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "not one of"),
        "archive.png": (b"PK\x03\x04" + bytes(60), "not one of"),
        "film.gif": (b"\x00\x00\x00\x18ftypmp42" + bytes(60), "not one of"),
        "packed.png": (b"\x1f\x8b\x08" + bytes(60), "not one of"),
        "object.png": (b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix", "not one of"),
        "program.png": (b"\x7fELF" + bytes(60), "not one of"),
        "script.png": (b"#!/bin/sh\nrm -rf /\n", "not one of"),
        "layers.tif": (b"8BPS\x00\x01" + bytes(60), "not one of"),
        "icon.bmp": (saved("ICO", Image.new("RGB", (16, 16))), "not one of"),
        "wavelets.jpg": (saved("JPEG2000"), "not one of"),
        "targa.bmp": (saved("TGA"), "not one of"),
    }
    return {name: Case(*case) for name, case in texts.items()}


def damaged():
    """What was a picture once."""
    cut = {f"cut.{fmt.lower()}": Case(saved(fmt)[: len(saved(fmt)) // 2], "damaged") for fmt in FORMATS if fmt != "GIF"}
    whole = saved("PNG", Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    middle = bytearray(whole)
    middle[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    nan, infinite = (np.full((4, 4), value, np.float32) for value in (np.nan, np.inf))
    return cut | {
        "cut.gif": Case(saved("GIF")[:15], "damaged"),
        "head.jpg": Case(saved("JPEG")[:20], "damaged"),
        "end.jpg": Case(saved("JPEG")[:-30], "damaged"),
        "no_header.png": Case(b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), "damaged"),
        "no_size.png": Case(png(0, 0), "damaged"),
        "no_pixels.png": Case(png(pixels=b""), "damaged", deep=True),
        "middle.png": Case(bytes(middle), "damaged", deep=True),
        "no_frame.jpg": Case(b"\xff\xd8\xff\xd9", "damaged"),
        "no_frame.gif": Case(b"GIF89a\x08\0\x08\0\0\0\0;", "damaged"),
        "nan.tif": Case(saved("TIFF", Image.fromarray(nan)), "not finite"),
        "infinite.tif": Case(saved("TIFF", Image.fromarray(infinite)), "not finite"),
    }


FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")


def good():
    """What looks odd and must not be refused."""
    deep = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    frames = {"save_all": True, "append_images": [Image.new("RGB", (40, SIDE), (0, 0, 255))]}
    pictures = {f"plain.{fmt.lower()}": saved(fmt) for fmt in FORMATS} | {
        "mistaken.jpg": saved("PNG"),
        "progressive.jpg": saved("JPEG", progressive=True),
        "ink.jpg": saved("JPEG", Image.new("CMYK", (9, 9), (9, 90, 0, 30))),
        "trailer.jpg": saved("JPEG") + b"made by a telephone" + bytes(99),
        "trailer.png": saved("PNG") + bytes(99),
        "exif.png": saved("PNG", exif=b"Exif\x00\x00MM\x00\x33\x00\x00\x00\x08"),
        "moving.gif": saved("GIF", **frames),
        "moving.webp": saved("WEBP", **frames),
        "moving.png": saved("PNG", **frames),
        "pages.tif": saved("TIFF", **frames),
        "open_end.gif": saved("GIF")[:-1],
        "deep.png": saved("PNG", deep),
        "deep.tif": saved("TIFF", deep),
        "float.tif": saved("TIFF", Image.fromarray(np.linspace(0, 1, 99, dtype=np.float32).reshape(9, 11))),
        "bits.png": saved("PNG", Image.new("1", (9, 9))),
        "point.png": saved("PNG", Image.new("RGB", (1, 1))),
        "strip.png": saved("PNG", Image.new("RGB", (5000, 1))),
    }
    return {name: Case(data) for name, data in pictures.items()}


def corpus():
    """All of them, under names that differ."""
    groups = {"stranger": strangers(), "damaged": damaged(), "bomb": bombs(), "good": good()}
    return {f"{group}_{name}": case for group, cases in groups.items() for name, case in cases.items()}


def special_files(folder):
    """Names that are not files at all, with their verdicts; made in a folder."""
    (folder / "dangling.jpg").symlink_to(folder / "gone.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    return {"dangling.jpg": "link to nothing", "loop.jpg": "symbolic links", "pipe.jpg": "not a regular file"}
