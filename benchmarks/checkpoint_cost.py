"""What checkpoints cost: time of a save against five minutes of training.

    python -m benchmarks.checkpoint_cost --parameters 0.1 10 100 --out /tmp/cost

A state is weights, their average and AdamW's two moments, in fp32: 16 bytes a parameter (in millions on the command
line). Each is saved several times, the older ones being removed as in a run; the middle time counts.
"""

import argparse
import json
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from calotype import checkpoint

EVERY = 300.0  # seconds between checkpoints
GOAL = 0.02


def main() -> int:
    """Print a table; 1 if a state costs more than its share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, nargs="+", default=[0.1, 10, 100], help="millions")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="a folder on the disk that is meant")
    args = parser.parse_args()
    rows = [measure(millions, args.saves, args.out / "checkpoints") for millions in args.parameters]
    print(f"{'parameters':>12} {'state':>10} {'CPU':>8} {'by the clock':>13} {'of 5 minutes':>13}  goal <= {GOAL:.0%}")
    for row in rows:
        print(
            f"{row['millions']:>10g} M {row['megabytes']:>7.1f} MB {row['cpu']:>6.2f} s {row['wall']:>11.2f} s "
            f"{row['wall'] / EVERY:>13.2%}"
        )
    print(json.dumps(rows))
    return int(any(row["wall"] > GOAL * EVERY for row in rows))


def measure(millions: float, saves: int, folder: Path) -> dict[str, float]:
    """Save a state of so many parameters several times; middle CPU and wall seconds."""
    parts = state(int(millions * 1e6))
    cpu, wall = [], []
    for step in range(1, saves + 1):
        began, used = time.monotonic(), cpu_seconds()
        checkpoint.save(folder, step, parts, {"seconds": 0.0}, keep=2)
        cpu.append(cpu_seconds() - used)
        wall.append(time.monotonic() - began)
    size = sum(file.stat().st_size for file in checkpoint.steps(folder)[-1].iterdir())
    shutil.rmtree(folder)
    middle = {"cpu": statistics.median(cpu), "wall": statistics.median(wall), "worst": max(wall)}
    return {"millions": millions, "megabytes": size / 1e6, **middle}


def state(parameters: int) -> dict[str, dict[str, Tensor]]:
    """Layers of a million weights and what remains."""
    sizes = [10**6] * (parameters // 10**6) + [parameters % 10**6] * (parameters % 10**6 > 0)
    names = ("unet", "unet_ema", "first_moments", "second_moments")
    return {name: {f"layer.{i}": torch.randn(size) for i, size in enumerate(sizes)} for name in names}


def cpu_seconds() -> float:
    """CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
