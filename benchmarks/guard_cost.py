"""What the guard against steps that are not finite costs, in CPU time, beside a step without it.

    python -m benchmarks.guard_cost --run RUN

What it adds to a step (a mask, the masked update and average, the reading of the figures) is timed by itself, as the
difference between the same operations with it and without it; and whole steps with and without it take turns.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

from calotype import guards, updates
from calotype.device import accelerator
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.train import DiffusionStage

_EACH = 10  # steps between two readings of the figures


def main() -> int:
    """Print the figures; 1 if the share is above its goal of 1 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    figures = cost(args.run, args.rounds)
    print(json.dumps(figures))
    return int(figures["share"] > 0.01)


def cost(run: Path, rounds: int) -> dict[str, float]:
    """Milliseconds of a step, with and without the guard (A B A B), of what it adds, and the share of that."""
    settings = DiffusionSettings(out="", latents=run / "latents", precision="fp32", **DiffusionSettings.PRESETS["tiny"])
    stage = DiffusionStage(settings, run / "stage1_vae" / "vae", accelerator("fp32"))
    batches = stage.batches(0)
    with_guard, without = [], []
    for i in range(rounds):
        with_guard.append(_milliseconds(lambda i=i: stage.step(next(batches), i)))
        without.append(_milliseconds(lambda i=i: _plain_step(stage, next(batches), i)))
    added = median(_update(stage, True) - _update(stage, False) for _ in range(rounds)) + _reading(stage, rounds)
    step = median(without)
    return {"step": step, "step_with": median(with_guard), "added": added, "share": added / step}


def _milliseconds(call) -> float:
    began = time.process_time()
    call()
    return 1000 * (time.process_time() - began)


def _plain_step(stage: DiffusionStage, batch, step: int) -> None:
    """The step of stage 2 as it would be without a guard."""
    stage.backward(batch, step)
    _after_backward(stage, step, guarded=False)


def _after_backward(stage: DiffusionStage, step: int, guarded: bool) -> None:
    optimizer = stage.optimizer.optimizer
    norm = stage.accelerator.clip_grad_norm_(stage.wrapped.parameters(), stage.settings.clip)
    optimizer.grad_scale = optimizer.found_inf = None
    if guarded:
        updates._leave_out_unless(norm.isfinite(), optimizer)
    stage.optimizer.step()
    for track in (stage.ema, stage.wide):
        for name, average in track.items():
            average.update(stage.models[name], step + 1, norm.isfinite() if guarded else None)


def _update(stage: DiffusionStage, guarded: bool) -> float:
    """CPU milliseconds of all that comes after the backward pass; the gradients are made, not found."""
    for parameter in stage.net.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    return _milliseconds(lambda: _after_backward(stage, 1000, guarded))


def _reading(stage: DiffusionStage, rounds: int) -> float:
    """CPU milliseconds a step of reading the figures and looking for jumps, beyond a mean of each figure."""
    window = [{"loss": torch.rand(()) + 1, "gradient_norm": torch.rand(())} for _ in range(_EACH)]
    guard = guards.Guard(stage, Path())

    def watched() -> None:
        found = guards.read(window, 0, stage.accelerator)
        guard.left_out(found)
        guard.jumped(found)

    def plain() -> None:
        for name in window[0]:
            torch.stack([values[name] for values in window]).mean().item()

    return median(_milliseconds(watched) - _milliseconds(plain) for _ in range(rounds)) / _EACH


if __name__ == "__main__":
    sys.exit(main())
