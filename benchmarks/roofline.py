"""Which share of what this machine can multiply does each part reach?

    python -m benchmarks.roofline
    python -m benchmarks.roofline --preset small --side 8 --compile

The peak is the fastest of a few large matrix products and convolutions in bf16, found in the same run. The parts are
the UNet's forward and a whole step of stage 2 with its optimiser and averages (batch 32), and the decoder (batch 8), on
one thread. Operations are those of the stock networks (two for a multiplication and an addition, three forwards for a
step), counted by torch; where the product needs fewer of them for the same result, its share grows, and "as computed"
counts what is left.
"""

import argparse
import copy
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.figures import Figure, conclude
from benchmarks.subjects import CLASSES, diffusion_stage, write_autoencoder, write_latents
from benchmarks.timing import median, one_thread, take_turns
from calotype import device, upsampling
from calotype.autoencoder import load_autoencoder
from calotype.stage2_diffusion.config import DiffusionSettings

GOALS = {"UNet forward, batch 32": 60.0, "step of stage 2, batch 32": 57.0, "decoder, batch 8": 72.0}  # % of the peak
_SIDES = (1024, 2048, 4096)  # of matrices
_CHANNELS = (256, 512)  # of convolutions of 3x3 on 16x16, batch 32


def main() -> int:
    """Print a table; 1 if a share misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", choices=DiffusionSettings.PRESETS)
    parser.add_argument("--side", type=int, default=16, help="of the latents (4 channels)")
    parser.add_argument("--compile", action="store_true", help="compile the parts first, which takes minutes")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        parts = subjects(args, Path(folder))
        as_computed = {name: count_operations(work) for name, work in parts.items()}
        with mock.patch.multiple(upsampling, _FEWEST_TRAINED=math.inf, _FEWEST_FROZEN=math.inf):
            operations = {name: count_operations(work) for name, work in parts.items()}
        found = take_turns(probes() | parts, args.rounds, warm_up=2)
    peak_of, peak = max(((name, n / median(found[name])) for name, n in PROBES.items()), key=lambda pair: pair[1])
    figures = [Figure("peak in bf16", peak / 1e9, "GFLOP/s", how=peak_of)]
    for name, done in operations.items():
        rates = sorted(100 * done / seconds / peak for seconds in found[name])
        middle, low, high = median(rates), rates[len(rates) // 10], rates[-1 - len(rates) // 10]
        how = f"{done / 1e9:.1f} GFLOP in {1000 * median(found[name]):.1f} ms"
        figures.append(Figure(name, middle, "%", GOALS[name], False, low, high, how))
        if as_computed[name] != done:
            share, how = middle * as_computed[name] / done, f"{as_computed[name] / 1e9:.1f} GFLOP"
            figures.append(Figure(f"{name}, as computed", share, "%", how=how))
    return conclude("roofline", figures, vars(args))


PROBES = {f"product of {n}x{n}": 2 * n**3 for n in _SIDES} | {
    f"convolution of {c} channels": 2 * 32 * 16 * 16 * c * c * 9 for c in _CHANNELS
}


def probes() -> dict[str, Callable[[], Any]]:
    """Matrix products and convolutions in bf16, as large as machines like them."""
    where = {"dtype": torch.bfloat16, "device": device.device()}
    found: dict[str, Callable[[], Any]] = {}
    for n in _SIDES:
        found[f"product of {n}x{n}"] = partial(torch.mm, torch.randn(n, n, **where), torch.randn(n, n, **where))
    for c in _CHANNELS:
        x, weight = torch.randn(32, c, 16, 16, **where), torch.randn(c, c, 3, 3, **where)
        convolve = partial(torch.nn.functional.conv2d, x, weight, padding=1)
        found[f"convolution of {c} channels"] = torch.inference_mode()(convolve)
    return found


def subjects(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Any]]:
    """What is measured: the product's own parts in its own way."""
    latents = write_latents(folder / "latents", (4, args.side, args.side))
    more = ["--precision", "bf16", *(["--compile"] if args.compile else [])]
    stage = diffusion_stage(latents, args.preset, 32, *more)
    batch, number = next(stage.batches(0)), count()
    vae = load_autoencoder(write_autoencoder(folder / "vae", args.preset, 4 * args.side), "--vae")
    device.for_drawing(vae, "bf16", compiled=args.compile)
    z = batch.x.to(device.device())
    t, y = torch.full((32,), 500.0, device=z.device), torch.arange(32, device=z.device) % CLASSES
    unet = copy.deepcopy(stage.net.unet)
    device.for_drawing(unet, "bf16", compiled=args.compile)

    @torch.inference_mode()
    def forward():
        with device.autocast("bf16"):
            return unet(z, t, class_labels=y).sample

    @torch.inference_mode()
    def decode():
        with device.autocast("bf16"):
            return vae.decode(z[:8]).sample

    return {
        "UNet forward, batch 32": forward,
        "step of stage 2, batch 32": lambda: stage.step(batch, next(number)),
        "decoder, batch 8": decode,
    }


def count_operations(work: Callable[[], Any]) -> int:
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


if __name__ == "__main__":
    sys.exit(main())
