"""How much memory does a step of stage 2 need, beside diffusers' recipe on the same UNet, batch and pictures?

    python -m benchmarks.memory --preset small --batch-size 32

The peak within one step counts: on a GPU as its allocator tells it. On a CPU torch's profiler notes each block of
memory that its allocator gives out and takes back, to the byte; the largest sum of what is held, on top of what was
there before the step, is the peak. Both sides are measured in this way, in their second step, when the optimiser has
its moments. Beside it stand what is held between steps: weights, averages, moments, and the other's autoencoder, which
it needs in each step. Total = held + peak; the rest = total less weights, gradients, moments and averages, all counted
whole, though at the peak not every gradient is there.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.figures import Figure, conclude
from benchmarks.stage2 import Stepping, make_cache, stage_of
from benchmarks.stage2_baselines import Diffusers
from benchmarks.timing import one_thread
from calotype.config import PRESET_IMAGE_SIZE
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.train import DiffusionStage

GOALS = {  # of diffusers' total, and of diffusers' rest
    "bf16": (0.95, None),
    "bf16, one average": (0.95, None),
    "bf16, checkpointing": (0.95, 0.65),
    "bf16, one average, checkpointing": (0.95, 0.65),
}
RECIPES = {  # flags of ours
    "fp32": ["--precision", "fp32"],
    "bf16": ["--precision", "bf16"],
    "bf16, one average": ["--precision", "bf16", "--no-snapshots"],
    "bf16, checkpointing": ["--precision", "bf16", "--gradient-checkpointing"],
    "bf16, one average, checkpointing": ["--precision", "bf16", "--no-snapshots", "--gradient-checkpointing"],
}


class Held(NamedTuple):
    """Bytes: of the weights, gradients and moments of what is trained with their averages; and of all at the peak."""

    model: int
    total: int

    @property
    def rest(self) -> int:
        """Activations, and whatever else comes and goes."""
        return self.total - self.model


def main() -> int:
    """Print a table; 1 if a figure misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=DiffusionSettings.PRESETS)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, help="default: by preset")
    args = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        run = make_cache(Path(folder), args.preset, args.image_size or int(PRESET_IMAGE_SIZE[args.preset]))
        stages = {
            name: lambda flags=flags: stage_of(run, args.preset, args.batch_size, flags[1], *flags[2:])
            for name, flags in RECIPES.items()
        }
        found = {"diffusers": of_diffusers(stages["fp32"](), run / "pictures", args.batch_size)}
        found |= {name: of_stage(build()) for name, build in stages.items()}
    return conclude("memory", figures(found), vars(args))


def of_stage(stage: DiffusionStage) -> Held:
    """What ours holds."""
    step = Stepping(stage)
    step()
    averages = [track.model for part in (stage.ema, stage.wide) for track in part.values()]
    model = bytes_of(stage.net.parameters(), *(average.parameters() for average in averages), moments(stage.optimizer))
    gradients = bytes_of(p for p in stage.net.parameters() if p.requires_grad)
    return Held(model + gradients, model + peak(step))


def of_diffusers(stage: DiffusionStage, pictures: Path, batch: int) -> Held:
    """What the other holds, with copies of a stage's networks."""
    recipe = Diffusers(stage.net.unet, stage.vae(), sorted(pictures.rglob("*.png")), batch)
    recipe.step()
    update = recipe.update
    weights = bytes_of(recipe.unet.parameters())
    model = weights + bytes_of(recipe.vae.parameters(), update.averages.values(), moments(update.optimizer))
    return Held(model + weights, model + peak(recipe.step))


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that an optimiser keeps."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def bytes_of(*groups: Iterable[Tensor | nn.Parameter]) -> int:
    """What these tensors take, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for group in groups for t in group}
    return sum(storages.values())


def peak(work: Callable[[], Any]) -> int:
    """The most bytes that a call holds at a time, on top of what was there before it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        work()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "this build of torch notes no memory"
    changes = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(changes.cumsum(0).max().clamp_min(0))


def figures(found: dict[str, Held]) -> list[Figure]:
    """Megabytes of each, and shares of the other's."""
    usual, rows = found["diffusers"], []
    for name, held in found.items():
        how = f"{held.model / 1e6:.0f} MB weights, gradients, moments, averages"
        rows.append(Figure(f"peak of a step: {name}", held.total / 1e6, "MB", how=how))
    for name in list(found)[1:]:
        total, rest = GOALS.get(name, (None, None))
        held = found[name]
        how = "" if "one average" in name else "with a second average, which diffusers has not"
        rows.append(Figure(f"total of {name} / diffusers", held.total / usual.total, "x", total, True, how=how))
        rows.append(Figure(f"rest of {name} / diffusers", held.rest / usual.rest, "x", rest, True))
    return rows


if __name__ == "__main__":
    sys.exit(main())
