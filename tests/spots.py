"""Soft spots on a dark ground, pictures that are none, and a detector that knows only the former."""

import numpy as np
from PIL import Image

from calotype import cli

SIDE = 12


def bump(rng):
    """A soft spot somewhere near the middle, with a little noise: what is normal."""
    (x, y), (row, column) = rng.uniform(3, 9, 2), np.mgrid[:SIDE, :SIDE]
    spot = 200 * np.exp(-((row - y) ** 2 + (column - x) ** 2) / 8)
    return np.clip(20 + spot + rng.normal(0, 6, (SIDE, SIDE)), 0, 255)


def stranger(rng, kind):
    """An empty picture ("flat"), simpler than any normal one, or noise."""
    if kind == "flat":
        return np.full((SIDE, SIDE), rng.uniform(10, 60))
    return rng.uniform(0, 255, (SIDE, SIDE))


def save(x, file):
    """Write levels (H, W) as a picture, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x.astype(np.uint8)).save(file)
    return file


def fitted(root):
    """A run in `root` with a detector of soft spots, made by the command."""
    rng = np.random.default_rng(0)
    for i in range(240):
        save(bump(rng), root / "normal" / f"{i:03d}.png")
    length = ["--steps", "60", "--flow-steps", "40", "--latent-dim", "4", "--image-size", str(SIDE), "--val", "0.3"]
    argv = ["anomaly", "fit", str(root / "normal"), *length, "--precision", "fp32", "--out", str(root / "run")]
    assert cli.main(argv) == 0
    return root / "run"
