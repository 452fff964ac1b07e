import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from hostile import png
from PIL import Image, ImageFile
from torch.testing import assert_close

from calotype.errors import UserError
from calotype.images import (
    UnreadableImage,
    denormalize,
    draft_for,
    fit_image,
    image_grid,
    load_image,
    normalize,
    to_pil,
    to_uint8,
)


def saved(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    file.seek(0)
    return file


def gradient(height=24, width=40):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], axis=-1).astype(np.uint8)


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(3 * 10**6), 9)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


# What a camera stores for each EXIF orientation, so that the viewer's picture is `upright`.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_all_eight_exif_orientations_load_upright(orientation, fmt):
    upright = gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    np.testing.assert_array_equal(np.asarray(load_image(saved(stored, fmt, exif=exif), channels=3)), upright)


@pytest.mark.parametrize(
    ("fmt", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("TIFF", "<i4"), ("PPM", "<u2")]
)
def test_sixteen_bits_keep_their_whole_range(fmt, dtype):
    ramp = np.arange(65536).reshape(256, 256)
    loaded = np.asarray(load_image(saved(Image.fromarray(ramp.astype(dtype)), fmt), channels=1))
    assert len(np.unique(loaded)) == 256
    assert np.abs(loaded - ramp / 257).max() <= 0.51  # never clipped, never shifted
    assert np.corrcoef(loaded.ravel(), ramp.ravel())[0, 1] > 0.9999


def test_dark_sixteen_bit_pictures_are_not_stretched():
    image = Image.fromarray(np.full((4, 4), 257 * 20, np.uint16))
    assert load_image(saved(image, "PNG"), channels=1).getpixel((0, 0)) == 20


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 5.0), (0.0, 1e6)])
def test_float_pictures_are_scaled_by_their_own_range(low, high):
    ramp = np.linspace(low, high, 64 * 64, dtype=np.float32).reshape(64, 64)
    loaded = np.asarray(load_image(saved(Image.fromarray(ramp), "TIFF"), channels=1))
    assert np.abs(loaded - np.linspace(0, 255, 64 * 64).reshape(64, 64)).max() <= 0.51


def test_wide_integers_are_scaled_and_constant_floats_survive():
    ramp = np.linspace(-(10**6), 10**6, 4096).astype(np.int32).reshape(64, 64)
    loaded = np.asarray(load_image(saved(Image.fromarray(ramp), "TIFF"), channels=1))
    assert np.corrcoef(loaded.ravel(), ramp.ravel())[0, 1] > 0.9999
    flat = Image.fromarray(np.full((4, 4), 7.0, np.float32))
    assert load_image(saved(flat, "TIFF"), channels=3).getpixel((0, 0)) == (0, 0, 0)


def test_floats_that_are_not_finite_are_refused():
    image = Image.fromarray(np.array([[0.0, np.nan], [1.0, 2.0]], np.float32))
    with pytest.raises(UnreadableImage, match="not finite"):
        load_image(saved(image, "TIFF"), channels=1)


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 90)])
def test_alpha_is_composited_by_the_over_formula(background):
    rgba = np.dstack([gradient(), np.linspace(0, 255, 24 * 40).reshape(24, 40).astype(np.uint8)])
    loaded = load_image(saved(Image.fromarray(rgba), "PNG"), channels=3, background=background)
    alpha = rgba[..., 3:] / 255
    golden = rgba[..., :3] * alpha + np.array(background) * (1 - alpha)
    assert np.abs(np.asarray(loaded) - golden).max() <= 1


def transparent(mode):
    if mode in ("LA", "PA"):
        return Image.new(mode, (4, 4), (9, 0)), {}
    if mode == "I;16":
        return Image.fromarray(np.full((4, 4), 700, np.uint16)), {"transparency": 700}
    image = Image.new(mode, (4, 4), 1)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    return image, {"transparency": (1, 0, 0) if mode == "RGB" else 1}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["LA", "PA", "P", "L", "RGB", "I;16"])
def test_hidden_colours_do_not_show(mode, channels):
    image, options = transparent(mode)
    file = saved(image, "TIFF" if mode == "PA" else "PNG", **options)
    loaded = load_image(file, channels=channels)
    assert loaded.mode == {1: "L", 3: "RGB"}[channels]
    assert np.asarray(loaded).min() == 255


@pytest.mark.parametrize("fmt", ["JPEG", "TIFF"])
@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (200, 30, 30, 10), (0, 255, 128, 60), (10, 10, 10, 240)])
def test_cmyk_is_near_the_textbook_formula(fmt, ink):
    image = Image.merge("CMYK", [Image.new("L", (16, 16), level) for level in ink])
    options = {"quality": 95} if fmt == "JPEG" else {}
    golden = [(255 - level) * (255 - ink[3]) / 255 for level in ink[:3]]
    loaded = load_image(saved(image, fmt, **options), channels=3)
    assert np.abs(np.asarray(loaded)[8, 8] - golden).max() <= 8
    assert load_image(saved(image, fmt, **options), channels=1).mode == "L"


@pytest.mark.parametrize("channels", [1, 3])
def test_lab_pictures_keep_their_grey(channels):
    grey = Image.merge("LAB", [Image.new("L", (4, 4), level) for level in (137, 128, 128)])  # L* = 53.6: sRGB 128
    loaded = np.asarray(load_image(saved(grey, "TIFF"), channels=channels))
    assert np.abs(loaded.astype(int) - 128).max() <= 3


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "BMP", "PPM"])
def test_one_bit_pictures_are_black_and_white(fmt):
    bits = np.eye(8, dtype=bool)
    loaded = np.asarray(load_image(saved(Image.fromarray(bits), fmt), channels=1))
    np.testing.assert_array_equal(loaded, bits * 255)


def modes():
    """A picture in each mode, with the format that keeps it, and its RGB pixels by arithmetic alone."""
    rgb = gradient().astype(np.float64)
    grey, alpha = rgb[..., :1], np.linspace(0, 255, 24 * 40).reshape(24, 40, 1).round()
    palette = np.random.default_rng(0).integers(0, 256, (256, 3))
    coloured = palette[grey[..., 0].astype(int)]
    indexed = of_bytes("P", grey)
    indexed.putpalette(palette.astype(np.uint8).tobytes())
    levels = np.arange(24 * 40).reshape(24, 40, 1) * 68
    yield "1", Image.fromarray(grey[..., 0] > 99), "PNG", (grey > 99) * 255
    yield "L", of_bytes("L", grey), "PNG", grey
    yield "LA", of_bytes("LA", grey, alpha), "PNG", on_white(grey, alpha)
    yield "P", indexed, "PNG", coloured
    yield "P", indexed, "PNG with a hole", np.where(grey == grey[3, 3], 255, coloured)
    yield "RGB", of_bytes("RGB", rgb), "PNG", rgb
    yield "RGBA", of_bytes("RGBA", rgb, alpha), "PNG", on_white(rgb, alpha)
    yield "CMYK", of_bytes("CMYK", rgb, grey[::-1]), "TIFF", (255 - rgb) * (255 - grey[::-1]) / 255
    yield "I;16", Image.fromarray(levels[..., 0].astype("<u2")), "PNG", levels / 257
    yield "I;16B", Image.fromarray(levels[..., 0].astype(">u2")), "TIFF", levels / 257
    yield "I", Image.fromarray((levels[..., 0] * 10**4).astype(np.int32)), "TIFF", levels / levels.max() * 255
    yield "F", Image.fromarray((levels[..., 0] - 999).astype(np.float32)), "TIFF", levels / levels.max() * 255


def of_bytes(mode, *bands):
    pixels = np.dstack(bands).astype(np.uint8)
    return Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes())


def on_white(colour, alpha):
    return colour * alpha / 255 + 255 - alpha


@pytest.mark.parametrize("mode, image, fmt, golden", modes(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_mode_has_its_golden_pixels(mode, image, fmt, golden):
    fmt, _, hole = fmt.partition(" ")
    assert image.mode == mode
    options = {"transparency": int(gradient()[3, 3, 0])} if hole else {}
    loaded = np.asarray(load_image(saved(image, fmt, **options), channels=3))
    worst = np.abs(loaded - np.broadcast_to(golden, loaded.shape)).max()
    assert worst <= (8 if mode == "CMYK" else 1), worst


def test_deep_colours_keep_their_whole_range():
    levels = np.random.default_rng(0).integers(0, 65536, (24, 40, 3))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    loaded = np.asarray(load_image(io.BytesIO(png(40, 24, pixels=rows, bits=16)), channels=3))
    assert np.abs(loaded - levels / 257).max() <= 1


@pytest.mark.parametrize("orientation", STORED)
def test_deep_pictures_load_upright_too(orientation):
    levels = (np.arange(24 * 40).reshape(24, 40) * 68).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](levels[..., None])[..., 0]))
    loaded = np.asarray(load_image(saved(stored, "PNG", exif=exif), channels=1))
    np.testing.assert_array_equal(loaded, np.rint(levels / 257))


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(fmt):
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    loaded = load_image(saved(first, fmt, save_all=True, append_images=[second]), channels=3)
    assert to_uint8(loaded).shape == (3, 16, 16)
    assert np.abs(np.asarray(loaded, dtype=int) - [255, 0, 0]).max() <= 8


def test_draft_keeps_the_short_side_and_the_picture():
    file = saved(Image.fromarray(gradient(480, 800)), "JPEG", quality=95)
    whole, draft = load_image(file, channels=3), load_image(file, channels=3, draft_size=100)
    assert whole.size == (800, 480)
    assert draft.size == (200, 120)
    reduced = np.asarray(whole.reduce(4), dtype=float)
    assert np.abs(reduced - np.asarray(draft)).mean() < 3


def test_a_picture_that_is_decoded_small_is_the_one_that_is_decoded_whole():
    smooth = gradient(640, 640).astype(float)
    grain = np.random.default_rng(0).normal(0, 12, smooth.shape)
    file = saved(Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)), "JPEG", quality=92)
    small = load_image(file, channels=3, draft_size=draft_for((64, 64)))
    whole = load_image(file, channels=3)
    assert small.size == (160, 160)
    found, expected = (np.asarray(fit_image(image, (64, 64), "crop"), dtype=float) for image in (small, whole))
    assert 10 * np.log10(255**2 / ((found - expected) ** 2).mean()) > 48


def hostile_files(folder):
    picture = saved(Image.fromarray(gradient()), "PNG").getvalue()
    photo = saved(Image.fromarray(gradient()), "JPEG").getvalue()
    contents = {
        "empty.png": (b"", "empty file"),
        "cut.png": (picture[: len(picture) // 2], "damaged"),
        "cut.jpg": (photo[: len(photo) * 3 // 4], "damaged .*[Tt]runcated"),
        "head.jpg": (photo[:20], "damaged"),
        "page.jpg": (b"\n<!DOCTYPE html><html>404</html>", "HTML"),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "XML"),
        "notes.jpg": (b"just some text", "not one of"),
        "zeros.jpg": (bytes(5000), "not one of"),
        "._photo.jpg": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "AppleDouble"),
        "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        "phone.jpg": (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "HEIC"),
        "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not one of"),
    }
    for name, (data, reason) in contents.items():
        (folder / name).write_bytes(data)
        yield folder / name, reason
    (folder / "dangling.jpg").symlink_to(folder / "gone.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    yield from ((folder / "dangling.jpg", "link to nothing"), (folder / "loop.jpg", "symbolic links"))
    yield from ((folder / "folder.jpg", "folder"), (folder / "pipe.jpg", "not a regular file"))
    yield folder / "gone.jpg", "No such file"


def test_every_hostile_file_is_refused_with_its_reason(tmp_path):
    for path, reason in hostile_files(tmp_path):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            load_image(path, channels=3)
        message = str(caught.value)
        assert message.startswith(str(path)), message
        assert "\n" not in message
        assert isinstance(caught.value, UserError)


def test_a_name_with_a_newline_stays_on_one_line(tmp_path):
    path = tmp_path / "two\nlines.png"
    path.write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"two\\nlines.png") as caught:
        load_image(path, channels=3)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(5000, 5000), (13000, 13000), (60000, 60000), (2**31 - 1, 1)])
def test_a_bomb_is_refused_by_its_header(size, monkeypatch):
    def decode(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    file = png_header(*size)
    start = time.perf_counter()
    with pytest.raises(UnreadableImage, match="pixels"):
        load_image(file, channels=3, max_pixels=16_000_000)
    assert time.perf_counter() - start < 0.5


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_random_damage_gives_a_picture_or_an_unreadable_image():
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    refused = 0
    for fmt in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM"):
        options = {"exif": exif} if fmt in ("JPEG", "PNG", "WEBP") else {}
        data = saved(Image.fromarray(gradient()), fmt, **options).getvalue()
        for _ in range(60):
            damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
            damaged[rng.integers(min(len(damaged), 100))] = rng.integers(256)
            try:
                load_image(io.BytesIO(bytes(damaged)), channels=3, max_pixels=10**6)
            except UnreadableImage:
                refused += 1
    assert refused > 200


def test_damaged_exif_data_does_not_cost_the_picture():
    file = saved(Image.fromarray(gradient()), "PNG", exif=b"Exif\x00\x00MM\x00\x33\x00\x00\x00\x08")
    np.testing.assert_array_equal(np.asarray(load_image(file, channels=3)), gradient())


def test_pillow_is_left_as_it_was():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 12


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("shape", [(32, 32), (40, 10), (7, 300), (1, 5), (3000, 2), (31, 33)])
def test_every_fit_gives_the_asked_size(fit, mode, shape):
    fitted = fit_image(Image.new(mode, shape[::-1], 0), (24, 32), fit)
    assert (fitted.size, fitted.mode) == ((32, 24), mode)


def test_crop_takes_the_centre():
    x = np.zeros((20, 60, 3), np.uint8)
    x[:, 20:40] = 255
    assert np.asarray(fit_image(Image.fromarray(x), (20, 20), "crop")).min() == 255
    assert np.asarray(fit_image(Image.fromarray(x), (10, 10), "crop")).min() > 240


def test_resizing_is_antialiased():
    checks = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    for fit in ("crop", "pad", "stretch"):
        assert np.abs(np.asarray(fit_image(checks, (8, 8), fit)) - 127.5).max() < 2


def test_pad_leaves_a_small_digit_as_it_is():
    digit = np.zeros((28, 28), np.uint8)
    digit[5:20, 8:20] = np.random.default_rng(0).integers(0, 256, (15, 12))
    padded = np.asarray(fit_image(Image.fromarray(digit), (32, 32), "pad"))
    np.testing.assert_array_equal(padded, np.pad(digit, 2))


def test_pad_shows_everything_and_continues_the_edge():
    x = np.full((50, 100, 3), (250, 240, 230), np.uint8)
    x[20:30, 40:60] = 0
    padded = np.asarray(fit_image(Image.fromarray(x), (64, 64), "pad")).astype(int)
    assert np.abs(padded[:10] - [250, 240, 230]).max() == 0
    dark = (padded.sum(-1) < 360).sum()
    assert dark == pytest.approx(200 * 0.64**2, abs=12)


def test_numbers_and_pictures_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(3, 16, 16)
    x = normalize(pixels)
    assert (x.dtype, x.min().item(), x.max().item()) == (torch.float32, -1.0, 1.0)
    assert_close(denormalize(x), pixels, rtol=0, atol=0)
    assert_close(to_uint8(to_pil(pixels)), pixels, rtol=0, atol=0)
    assert denormalize(torch.tensor([-5.0, 5.0, 0.003, -0.003])).tolist() == [0, 255, 128, 127]
    assert to_pil(pixels[:1]).mode == "L"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_holds_each_picture_in_its_place(channels):
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, channels, 8, 8) * 40
    sheet = np.asarray(image_grid(images, columns=3, scale=2))
    assert sheet.shape == (2 + 2 * 18, 2 + 3 * 18, 3)
    for i in range(5):
        y, x = 2 + i // 3 * 18, 2 + i % 3 * 18
        assert (sheet[y : y + 16, x : x + 16] == 40 * i).all()
    assert (sheet[:2] == 255).all()
    assert (sheet[20:36, 38:] == 255).all()  # the empty sixth place


def test_captions_make_room_and_change_no_picture():
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    words = ["a", "a very long caption that cannot fit under one tile", "", "d"]
    plain = image_grid(images, 2)
    sheet = image_grid(images, 2, words, row_labels=["first", "second"])
    assert sheet.width > plain.width
    assert sheet.height > plain.height + 2 * 10
    assert (np.asarray(sheet) == 0).all(-1).sum() == 4 * 96 * 96 == (np.asarray(plain) == 0).all(-1).sum()
