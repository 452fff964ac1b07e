import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import astuple, replace

import numpy as np
import pytest
from PIL import Image, ImageCms

from calotype.shapes import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    FULL,
    PLAIN,
    SHAPES,
    SIZES,
    Factors,
    draw_factors,
    render,
)

VARIATIONS = {"plain": PLAIN, "full": FULL}
STAR = Factors("star", "red", "large", "white", 0.5, 0.5, 0.0)


def coverage(factors, size):
    """How much of each pixel (H, W) the shape covers, read off the colours."""
    pixels = np.asarray(render(factors, size), dtype=float)
    back = np.array(BACKGROUNDS[factors.background], dtype=float)
    change = np.array(COLOURS[factors.colour]) - back
    return (pixels - back) @ change / (change @ change)


def samples(variation, count=150):
    return [draw_factors(3, index, variation) for index in range(count)]


def test_classes_are_every_colour_and_shape_once():
    assert (len(SHAPES), len(COLOURS), len(CLASSES), len(set(CLASSES))) == (6, 8, 48, 48)
    assert CLASSES[0] == "red circle"
    assert CLASSES[:6] == tuple(f"red {shape}" for shape in SHAPES)
    assert [STAR.name, CLASSES[STAR.label]] == ["red star"] * 2


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
def test_a_picture_depends_on_seed_and_index_alone(variation):
    forward = [draw_factors(0, i, variation) for i in range(100)]
    backward = [draw_factors(0, i, variation) for i in reversed(range(100))][::-1]
    assert forward == backward
    assert len(set(forward)) == 100
    assert forward != [draw_factors(1, i, variation) for i in range(100)]


def test_another_process_draws_the_same_pictures():
    code = (
        "import json; from dataclasses import astuple; from calotype.shapes import FULL, draw_factors, render\n"
        "f = draw_factors(7, 10**9, FULL); print(json.dumps([astuple(f), render(f, (16, 16)).tobytes().hex()]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    factors = draw_factors(7, 10**9, FULL)
    assert json.loads(result.stdout) == [list(astuple(factors)), render(factors, (16, 16)).tobytes().hex()]


def test_blocks_of_48_hold_every_class_once_in_changing_order():
    orders = [[draw_factors(5, 48 * block + i).label for i in range(48)] for block in range(40)]
    assert all(sorted(order) == list(range(48)) for order in orders)
    assert len({tuple(order) for order in orders}) == 40


def test_a_split_by_every_tenth_index_keeps_every_class():
    assert len({draw_factors(0, index).label for index in range(0, 4800, 10)}) == 48


def test_factors_fill_their_ranges():
    factors = [draw_factors(0, i, FULL) for i in range(2000)]
    for name, values in (("size", SIZES), ("background", BACKGROUNDS)):
        counts = Counter(getattr(f, name) for f in factors)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.7 * 2000 / len(values)
    assert np.ptp([f.rotation for f in factors]) > 355
    assert len({f.caption.split(" star ")[1] for f in factors if f.shape == "star"}) == 9
    plain = [draw_factors(0, i, PLAIN) for i in range(300)]
    assert {f.size for f in plain} == {"medium", "large"}
    assert 10 < max(abs(f.rotation) for f in plain) <= 15
    assert 0 < np.std([f.x for f in plain]) < 0.06


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
def test_the_shape_lies_inside_and_about_its_place(variation):
    y, x = (np.indices((64, 64)) + 0.5) / 64
    for factors in samples(variation):
        mask = coverage(factors, (64, 64))
        edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert np.abs(edge).max() < 1e-6, factors
        centre = (mask * x).sum() / mask.sum(), (mask * y).sum() / mask.sum()
        assert centre == pytest.approx((factors.x, factors.y), abs=0.01), factors


def test_a_larger_size_covers_more_and_shapes_weigh_alike():
    areas = {s: [coverage(replace(STAR, shape=s, size=size), (64, 64)).mean() for size in SIZES] for s in SHAPES}
    for small, medium, large in areas.values():
        assert large / small == pytest.approx((SIZES["large"] / SIZES["small"]) ** 2, rel=0.1)
        assert small < medium < large
    large = [area[-1] for area in areas.values()]
    assert max(large) / min(large) < 1.9


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (128, 128)])
def test_small_pictures_are_the_mean_of_large_ones(size):
    for factors in samples(FULL, 12):
        small = np.asarray(render(factors, size), dtype=float)
        large = render(factors, (size[0] * 4, size[1] * 4))
        reduced = np.asarray(large.resize(size[::-1], Image.Resampling.BOX), dtype=float)
        assert np.abs(small.mean((0, 1)) - reduced.mean((0, 1))).max() < 1.5
        assert np.abs(small - reduced).max() < 60
        assert np.abs(small - reduced).mean() < 1


def test_rotation_turns_anticlockwise():
    turned = coverage(replace(STAR, shape="heart", rotation=90), (64, 64))
    upright = coverage(replace(STAR, shape="heart"), (64, 64))
    assert np.abs(turned - np.rot90(upright)).mean() < 0.01
    assert np.abs(turned - upright).mean() > 0.02


@pytest.mark.parametrize(("shape", "wide_half"), [("triangle", "lower"), ("heart", "upper")])
def test_shapes_stand_upright(shape, wide_half):
    rows = (coverage(replace(STAR, shape=shape), (64, 64)) > 0.5).sum(axis=1)
    rows = rows[rows > 0]
    upper, lower = rows[: len(rows) // 2].sum(), rows[-(len(rows) // 2) :].sum()
    assert (upper > lower) == (wide_half == "upper")


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [
        (0.5, 0.5, "in the middle"),
        (0.3, 0.2, "at the top left"),
        (0.5, 0.8, "at the bottom"),
        (0.7, 0.5, "at the right"),
        (0.7, 0.7, "at the bottom right"),
    ],
)
def test_captions_read_well(x, y, place):
    assert replace(STAR, x=x, y=y).caption == f"a large red star {place}"


def test_colours_are_far_apart_in_lab():
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")

    def lab(rgb):
        lightness, *ab = ImageCms.applyTransform(Image.new("RGB", (1, 1), rgb), to_lab).getpixel((0, 0))
        return np.array([lightness / 2.55, *((v + 128) % 256 - 128 for v in ab)])

    colours, backgrounds = ([lab(rgb) for rgb in table.values()] for table in (COLOURS, BACKGROUNDS))
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) > 42
    assert min(np.linalg.norm(a - b) for a in colours for b in backgrounds) > 38
