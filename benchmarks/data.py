"""How fast do pictures become latents, and latents batches? Ours beside what other trainers do, on the same files.

    python -m benchmarks.data
    python -m benchmarks.data --parts reader
    python -m benchmarks.data --parts photographs --preset base --photographs 20

reader: batches of cached latents as stage 2 takes them, with the noise of the posterior and the labels, beside a file a
picture (torch.load, numpy.load); rows alone without noise; and the share of a step of stage 2 that reading takes.
photographs: a folder of JPEGs to a finished cache by `calotype encode`, from the listing of the files to the hashes,
beside torchvision's ImageFolder with a DataLoader as it is by default and the same autoencoder in fp32. Both take turns
on one thread; CPU time counts. Where our time goes, and how far a picture decoded at a fraction of its size is from the
whole one, is told beside it.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.figures import Figure, conclude, of_ratio
from benchmarks.photographs import stock_pass, write_photographs
from benchmarks.subjects import diffusion_stage, write_autoencoder, write_latents
from benchmarks.timing import median, one_thread, take_turns, times_as_fast
from calotype import cli
from calotype import data as pictures_of
from calotype.config import PRESET_IMAGE_SIZE
from calotype.images import draft_for, fit_image
from calotype.latents import LatentBatches, LatentCache, Shards
from calotype.picture_files import load_image
from calotype.stage1_vae import encode
from calotype.stage1_vae.config import VaeSettings

SHAPES = ((4, 8, 8), (4, 32, 32))
FEWEST = 50_000  # cached latents (4, 8, 8) a second
MOST_WAITING = 0.01  # of a step
FASTER = 1.9  # than the stock loader and an encoder in fp32
BATCH = 64  # latents
AT_ONCE = 16  # batches that are timed together


def main() -> int:
    """Print a table; 1 if a figure misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["reader", "photographs"], choices=["reader", "photographs"])
    parser.add_argument("--latents", type=int, default=16_384, help="cached latents (4, 8, 8), and an eighth at 32x32")
    parser.add_argument("--preset", default="small", choices=VaeSettings.PRESETS, help="of the autoencoder")
    parser.add_argument("--image-size", type=int, help="default: by preset")
    parser.add_argument("--photographs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    one_thread()
    figures, parts = [], {"reader": of_reader, "photographs": of_photographs}
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            figures += parts[part](args, Path(folder))
    return conclude("data", figures, vars(args))


# Cached latents


def of_reader(args: argparse.Namespace, folder: Path) -> list[Figure]:
    """Images a second of each way to read, for small and large latents in one file and in many."""
    figures = []
    for shape in SHAPES:
        size = args.latents if shape == SHAPES[0] else args.latents // 8
        place = folder / "x".join(map(str, shape))
        files = write_files(place / "files", shape, BATCH * AT_ONCE)
        caches = {f"{n} shards": write_latents(place / str(n), shape, size, size // n) for n in (1, 16)}
        seconds = take_turns(readers(caches, shape, files), args.rounds + 2)
        figures += [rate_of(f"{name}, {place.name}", taken, shape) for name, taken in seconds.items()]
    return [*figures, waiting(folder, args.rounds)]


def readers(caches: dict[str, Path], shape: tuple[int, int, int], files: list[Path]) -> dict[str, Callable]:
    """What reads AT_ONCE batches."""
    ways = {}
    for name, folder in caches.items():
        cache = LatentCache(folder, "train")
        ways[f"ours, {name}"] = batch_after_batch(LatentBatches(cache, seed=0).at)
        ways[f"ours, {name}, rows alone"] = batch_after_batch(rows_of(cache))
    ways["a .pt file each"] = lambda: read_files(files, shape, lambda file: torch.load(file, weights_only=True))
    arrays = [file.with_suffix(".npy") for file in files]
    ways["a .npy file each"] = lambda: read_files(arrays, shape, lambda file: torch.from_numpy(np.load(file)))
    return ways


def batch_after_batch(read: Callable[[range], Any]) -> Callable[[], None]:
    """Each call reads the next AT_ONCE batches."""
    starts = count(0, BATCH)

    def work() -> None:
        for _ in range(AT_ONCE):
            start = next(starts)
            read(range(start, start + BATCH))

    return work


def rows_of(cache: LatentCache) -> Callable[[range], Tensor]:
    """Mean and deviation in the order of training, without its noise."""
    order = LatentBatches(cache, seed=0).order

    def read(positions: range) -> Tensor:
        items = order.indices(positions)
        return cache.gather(items, "mean") + cache.gather(items, "std")

    return read


def write_files(folder: Path, shape: tuple[int, int, int], number: int) -> list[Path]:
    """Moments (2, c, h, w) in files of their own, as .pt and .npy; the former are returned."""
    folder.mkdir(parents=True)
    files = [folder / f"{i:06d}.pt" for i in range(number)]
    for file in files:
        moments = torch.randn(2, *shape)
        torch.save(moments, file)
        np.save(file.with_suffix(".npy"), moments.numpy())
    return files


def read_files(files: list[Path], shape: tuple[int, int, int], load: Callable[[Path], Tensor]) -> None:
    """Batches of sampled latents from a file each, in an order of chance."""
    order = torch.randperm(len(files)).tolist()
    for start in range(0, len(files), BATCH):
        moments = torch.stack([load(files[i]) for i in order[start : start + BATCH]])
        torch.addcmul(moments[:, 0], moments[:, 1], torch.randn(len(moments), *shape))


def rate_of(name: str, seconds: list[float], shape: tuple[int, int, int]) -> Figure:
    """Images a second; a whole batch of small latents has a goal."""
    rates = sorted(BATCH * AT_ONCE / taken for taken in seconds)
    goal = FEWEST if name.startswith("ours") and "rows" not in name and shape == SHAPES[0] else None
    how = f"batches of {BATCH}, {AT_ONCE} at once"
    return Figure(name, median(rates), "images/s", goal, False, rates[0], rates[-1], how)


def waiting(folder: Path, rounds: int) -> Figure:
    """The share of a step of stage 2 on small latents that reading its batch takes."""
    stage = diffusion_stage(write_latents(folder / "run" / "latents", SHAPES[0], 4096), "tiny", BATCH)
    batches, held = stage.batches(0), []

    def read() -> None:
        held[:] = [next(batches)]

    seconds = take_turns({"read": read, "step": lambda: stage.step(held[0], 1)}, rounds)
    shares = sorted(read / (read + step) for read, step in zip(seconds["read"], seconds["step"], strict=True))
    how = f"preset tiny, {SHAPES[0]}, batch {BATCH}"
    return Figure("share of a step", median(shares), "", MOST_WAITING, True, shares[0], shares[-1], how)


# Photographs


def of_photographs(args: argparse.Namespace, folder: Path) -> list[Figure]:
    """How many times as fast, where our time goes, and what decoding at a fraction of the size changes."""
    size = args.image_size or int(PRESET_IMAGE_SIZE[args.preset])
    vae = write_autoencoder(folder / "vae", args.preset, size)
    pictures = write_photographs(folder / "pictures", args.photographs, seed=0)
    caches, parts = (folder / f"cache{i}" for i in count()), []

    def ours() -> None:
        parts.append({})
        with metered(parts[-1]):
            assert cli.main(["encode", str(pictures), "--vae", str(vae), "--out", str(next(caches))]) == 0

    usual = partial(stock_pass, pictures, vae, size, folder / "usual.pt")
    seconds = take_turns({"usual": usual, "ours": ours}, args.rounds)
    ratio = times_as_fast(seconds["usual"], seconds["ours"])
    how = f"preset {args.preset}, {size}x{size}, {args.photographs} JPEGs of 500 to 1,000 pixels a side"
    figures = [of_ratio("folder of JPEGs to cache", ratio, FASTER, how)]
    figures += [Figure(f"{name}: pictures", args.photographs / median(seconds[name]), "/s") for name in seconds]
    return [*figures, *where_it_goes(parts[1:], seconds["ours"], args.photographs), draft_error(pictures, size)]


def where_it_goes(parts: list[dict[str, float]], whole: list[float], number: int) -> list[Figure]:
    """CPU milliseconds a picture of each part, and of the rest."""
    each = {part: median([found[part] for found in parts]) for part in parts[0]}
    each["the rest"] = median(whole) - sum(each.values())
    return [Figure(f"ours: {part}", 1000 * taken / number, "ms a picture") for part, taken in each.items()]


@contextlib.contextmanager
def metered(spent: dict[str, float]) -> Iterator[None]:
    """Add up the CPU seconds of the parts of `calotype encode`."""
    parts = {
        "data sheet (decodes, hashes, resizes)": (encode, "open_sheet"),
        "decoding again": (pictures_of, "load_image"),
        "resizing again": (pictures_of, "fit_image"),
        "encoder": (encode, "posterior"),
        "writing and hashing": (Shards, "write"),
    }
    before = {place: getattr(*place) for place in parts.values()}
    for part, place in parts.items():
        setattr(*place, _timed(before[place], part, spent))
    try:
        yield
    finally:
        for place, function in before.items():
            setattr(*place, function)


def _timed(function: Callable, part: str, spent: dict[str, float]) -> Callable:
    def call(*given, **named):
        began = time.process_time()
        try:
            return function(*given, **named)
        finally:
            spent[part] = spent.get(part, 0.0) + time.process_time() - began

    return call


def draft_error(folder: Path, size: int) -> Figure:
    """Peak signal-to-noise ratio between pictures decoded at a fraction of their size and whole ones, as resized."""
    found = []
    for file in sorted(folder.rglob("*.jpg")):
        pair = [
            fit_image(load_image(file, channels=3, draft_size=d), (size, size), "crop")
            for d in (draft_for((size, size)), None)
        ]
        a, b = (np.asarray(image, np.float64) for image in pair)
        found.append(10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 1e-9)))
    return Figure("decoded small against whole", median(found), "dB", low=min(found), high=max(found))


if __name__ == "__main__":
    sys.exit(main())
