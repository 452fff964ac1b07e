"""How do time and memory of stage 2 grow with batch, latent side, width, data set and processes? And its start?

    python -m benchmarks.growth --plot growth.svg
    python -m benchmarks.growth --axes data --latents 1000 10000 100000 1000000

Each axis is walked with the rest of the preset tiny as it is, in fp32, the points taking turns. The work of a step is
its floating point operations, as torch counts them; of a data set, its latents. The exponent is the slope of the
logarithms of time (CPU seconds of one thread, a GPU's events) or peak memory (benchmarks/memory.py) over the work: 1 is
linear. Processes each have a batch of their own, and their CPU seconds are added up. A start is the stage built on a
cache and the first batch; a cache alone is opened, with a batch, in a fraction of a millisecond a shard of 16,384, but
for the first time, when its shards are checked. The exponent of both is over the latents. The caches are synthetic.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.figures import Figure, conclude
from benchmarks.growth_plot import write_plot
from benchmarks.memory import peak
from benchmarks.stage2 import Stepping
from benchmarks.timing import median, one_thread, seconds, take_turns
from calotype.config import parse
from calotype.device import accelerator, leave
from calotype.latents import VERSION, Index, LatentBatches, LatentCache, write_shard
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.train import DiffusionStage

SHARD = 16_384  # latents
SHAPE = (4, 8, 8)
MOST_EXPONENT = 1.05
MOST_OF_START = 0.05  # the exponent of a start, which is not to depend on the data set
AXES = {"batch": [16, 32, 64, 128], "side": [4, 8, 16, 32], "width": [32, 64, 96, 128]}
TIMED = {*AXES, "data", "processes"}  # by their steps


class Point(NamedTuple):
    """One place on an axis; `memory` in bytes, 0 where it was not measured."""

    at: float
    work: float
    seconds: float
    memory: int = 0


def main() -> int:
    """Print a table; 1 if a figure misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    axes = [*AXES, "data", "processes"]
    parser.add_argument("--axes", nargs="+", default=axes, choices=axes)
    parser.add_argument("--latents", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="an SVG file to draw the growth into")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(*map(Path, args.work))
    one_thread()
    found: dict[str, list[Point]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for axis in args.axes:
            found |= walk(axis, args, Path(folder) / axis)
    if args.plot:
        write_plot(args.plot, {axis: [(p.work, p.seconds) for p in points] for axis, points in found.items()})
    rows = {axis: [point._asdict() for point in points] for axis, points in found.items()}
    return conclude("growth", [row for axis in found for row in figures(axis, found[axis])], vars(args), {"axes": rows})


def walk(axis: str, args: argparse.Namespace, folder: Path) -> dict[str, list[Point]]:
    """The points of one axis, or of the three of a data set."""
    folder.mkdir()
    if axis == "data":
        return of_data(args.latents, args.rounds, folder)
    if axis == "processes":
        return {axis: [of_processes(folder, count) for count in args.processes]}
    steps = {at: Stepping(stage_of(folder / str(at), axis, at)) for at in AXES[axis]}
    taken = take_turns(steps, args.rounds)
    return {axis: [Point(at, flops(step), median(taken[at]), peak(step)) for at, step in steps.items()]}


# Batch, side, width


def stage_of(folder: Path, axis: str = "", at: int = 0) -> DiffusionStage:
    """A stage of the preset tiny in fp32, with one value of its own, on a small synthetic cache in that folder."""
    side = at if axis == "side" else SHAPE[1]
    if not folder.exists():
        write_cache(folder, 1000, (SHAPE[0], side, side))
    words = ["--latents", str(folder), "--precision", "fp32", "--out", "unused", "--batch-size", "64"]
    words += {"batch": ["--batch-size", str(at)], "width": ["--width", str(at)]}.get(axis, [])
    return DiffusionStage(parse(DiffusionSettings, words, "train-diffusion"), folder, accelerator("fp32"))


def flops(step: Stepping) -> int:
    """Floating point operations of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


# A data set


def of_data(sizes: list[int], rounds: int, folder: Path) -> dict[str, list[Point]]:
    """Steps, first starts and later starts on caches of these sizes."""
    for size in sizes:
        write_cache(folder / str(size), size, SHAPE)
    time.sleep(2.5)  # until the shards count as settled
    first = [Point(size, size, seconds(partial(open_cache, folder / str(size)))) for size in sizes]
    found = {"cache for the first time": first}
    for name, work in (("cache", open_cache), ("start", start)):
        recipes = {size: partial(work, folder / str(size)) for size in sizes}
        taken = take_turns(recipes, rounds)
        found[name] = [Point(size, size, median(taken[size])) for size in sizes]
    steps = {size: Stepping(stage_of(folder / str(size))) for size in sizes}
    taken = take_turns(steps, rounds)
    return found | {"data": [Point(size, size, median(taken[size]), peak(step)) for size, step in steps.items()]}


def start(folder: Path) -> None:
    """Build the stage on a cache and read its first batch."""
    next(stage_of(folder).batches(0))


def open_cache(folder: Path) -> None:
    """Open a cache and read its first batch."""
    LatentBatches(LatentCache(folder, "train"), seed=0).at(range(64))


def write_cache(folder: Path, size: int, shape: tuple[int, int, int]) -> None:
    """A cache of noise; beyond the first shard the same latents come again."""
    folder.mkdir(parents=True)
    noise = torch.randn(min(size, SHARD), *shape, generator=torch.Generator().manual_seed(0))
    moments = {"mean": noise, "std": torch.full_like(noise, 0.1)}
    counts, names, sums = {"train": size, "val": 64}, {}, {}
    for split, count in counts.items():
        names[split] = [f"{split}-{i:05d}.safetensors" for i in range(-(-count // SHARD))]
        for i, name in enumerate(names[split]):
            here = min(SHARD, count - i * SHARD)
            part = {key: value[:here] for key, value in moments.items()}
            sums[name] = write_shard(folder / name, part, torch.zeros(here), [""] * here)
    Index(VERSION, "synthetic", "synthetic", list(shape), False, [], [32, 32], counts, names, sums).write(folder)


# Processes


def of_processes(folder: Path, count: int, steps: int = 12) -> Point:
    """CPU seconds of all processes for one step, each with a batch of 128."""
    cache, out = folder / "latents", folder / str(count)
    if not cache.exists():
        write_cache(cache, 10_000, SHAPE)
    out.mkdir()
    (out / "steps.json").write_text(json.dumps({"steps": steps, "batch": 128 * count}))
    launch = ["-m", "calotype.launch", "--standalone", f"--nproc_per_node={count}", "-m", "benchmarks.growth"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, "--work", str(cache), str(out)], check=True, env=environment)
    ranks = [json.loads(file.read_text()) for file in sorted(out.glob("rank*.json"))]
    assert len(ranks) == count, f"{len(ranks)} processes instead of {count}"
    return Point(count, count, sum(ranks))


def work(cache: Path, out: Path) -> int:
    """One process of several: write the CPU seconds of a step."""
    torch.set_num_threads(1)
    asked = json.loads((out / "steps.json").read_text())
    words = ["--latents", str(cache), "--precision", "fp32", "--out", "unused", "--batch-size", str(asked["batch"])]
    stage = DiffusionStage(parse(DiffusionSettings, words, "train-diffusion"), cache, accelerator("fp32"))
    step = Stepping(stage)
    taken = [seconds(step) for _ in range(asked["steps"])][2:]
    (out / f"rank{stage.accelerator.process_index}.json").write_text(json.dumps(median(taken)))
    if stage.accelerator.num_processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return 0


# The table


def figures(axis: str, points: list[Point]) -> list[Figure]:
    """The points, and the exponents of one axis."""
    name = "step, by latents" if axis == "data" else f"step, by {axis}" if axis in TIMED else f"{axis}, by latents"
    shown = ", ".join(f"{p.at:g}: {1000 * p.seconds:.3g} ms" for p in points)
    most = MOST_OF_START if axis == "start" else MOST_EXPONENT
    found = [Figure(f"{name}: exponent of time", exponent(points, "seconds"), "", most, True, how=shown)]
    if points[0].memory:
        shown = ", ".join(f"{p.at:g}: {p.memory / 1e6:.3g} MB" for p in points)
        found.append(
            Figure(f"{name}: exponent of memory", exponent(points, "memory"), "", MOST_EXPONENT, True, how=shown)
        )
    return found


def exponent(points: list[Point], what: str) -> float:
    """The slope of a straight line through the logarithms of a quantity over those of the work."""
    values: list[Any] = [getattr(point, what) for point in points]
    return float(np.polyfit(np.log([point.work for point in points]), np.log(values), 1)[0])


if __name__ == "__main__":
    leave(main)
