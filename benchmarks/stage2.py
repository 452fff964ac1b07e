"""Is a step of stage 2 faster than the usual ones? Ours and those of benchmarks/stage2_baselines.py, on the same work.

    python -m benchmarks.stage2 --presets base tiny
    python -m benchmarks.stage2 --presets small --batch-size 16 --compile

The same UNet, autoencoder, pictures and batch take turns in one process on one thread; CPU time counts (a GPU's events
where there is one). Ours is the real step of `train-diffusion` on cached latents, reading them included, with both of
its weight averages. Autoencoders have random weights, which cost the same. The autoencoder and the UNet of the preset
base have latent diffusion's own proportions: encoding is about half of the usual step; goals are for it.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from benchmarks.figures import Figure, conclude, of_ratio
from benchmarks.stage2_baselines import Diffusers, DiffusersUpdate, Original, Recipe, copy_of
from benchmarks.timing import median, one_thread, take_turns, times_as_fast
from benchmarks.tiny import write_pictures
from calotype import cli, loop
from calotype.config import PRESET_IMAGE_SIZE, parse
from calotype.device import accelerator, device
from calotype.ema import PowerEma
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.train import DiffusionStage

BATCH = {"tiny": 64, "small": 16, "base": 8, "large": 4}  # of a step that ends in seconds on one core
GOALS = {  # times as fast, for the preset `base`
    ("ours, bf16", "original"): 2.7,
    ("best", "original"): 3.0,
    ("best", "diffusers"): 3.3,
}
MOST_WAITING = 0.01  # of a step
MOST_OF_UPDATE = 0.4  # of diffusers' time
EACH = 4  # updates of which one is timed as a whole
_LEVELS = 3
UPDATED = {  # a UNet of about 24 million parameters
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (128, 256, 256),
    "down_block_types": ("DownBlock2D",) * _LEVELS,
    "up_block_types": ("UpBlock2D",) * _LEVELS,
    "add_attention": False,
}


def main() -> int:
    """Print a table; 1 if a figure misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["base", "tiny"], choices=DiffusionSettings.PRESETS)
    parser.add_argument("--batch-size", type=int, help="default: 64, 16, 8 and 4 for tiny, small, base and large")
    parser.add_argument("--image-size", type=int, help="default: by preset")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="let ours be compiled in a further recipe")
    parser.add_argument("--update-rounds", type=int, default=12, help="of optimiser, clipping and average alone")
    args = parser.parse_args()
    one_thread()
    figures = []
    for preset in args.presets:
        with tempfile.TemporaryDirectory() as folder:
            figures += of_preset(args, preset, Path(folder))
    if args.update_rounds:
        figures += of_update(args.update_rounds)
    return conclude("stage2", figures, vars(args))


# The whole step


def of_preset(args: argparse.Namespace, preset: str, folder: Path) -> list[Figure]:
    """The figures of one preset."""
    batch = args.batch_size or BATCH[preset]
    size = args.image_size or int(PRESET_IMAGE_SIZE[preset])
    run = make_cache(folder, preset, size)
    stages = {f"ours, {precision}": stage_of(run, preset, batch, precision) for precision in ("fp32", "bf16")}
    stages["ours, bf16, one average"] = stage_of(run, preset, batch, "bf16", "--no-snapshots")
    if args.compile:
        stages["ours, bf16, compiled"] = stage_of(run, preset, batch, "bf16", "--compile")
    usual = usual_recipes(stages["ours, fp32"], folder / "pictures", batch)
    seconds = take_turns(recipes(usual, stages), args.rounds)
    return report(preset, batch, size, seconds)


def make_cache(folder: Path, preset: str, size: int) -> Path:
    """Pictures of that side, an autoencoder of the preset with random weights, and its latents."""
    sheet = folder / "data.json"
    pictures = write_pictures(folder / "pictures", size)
    words = ["--preset", preset, "--steps", "0", "--precision", "fp32", "--out", str(folder / "stage1_vae")]
    words += ["--batch-size", "8", "--validations", "1"]
    assert cli.main(["data", str(pictures), "--image-size", str(size), "--out", str(folder)]) == 0
    assert cli.main(["train-vae", str(sheet), *words]) == 0
    vae = str(folder / "stage1_vae" / "vae")
    assert cli.main(["encode", str(sheet), "--vae", vae, "--out", str(folder / "latents")]) == 0
    return folder


def stage_of(run: Path, preset: str, batch: int, precision: str, *more: str) -> DiffusionStage:
    """Stage 2 as the command would build it."""
    words = ["--latents", str(run / "latents"), "--preset", preset, "--batch-size", str(batch)]
    words += ["--precision", precision, "--out", "unused", *more]
    settings = parse(DiffusionSettings, words, "train-diffusion")
    return DiffusionStage(settings, run / "stage1_vae" / "vae", accelerator(precision))


def usual_recipes(stage: DiffusionStage, pictures: Path, batch: int) -> dict[str, Recipe]:
    """The others with copies of a stage's networks."""
    files = sorted(pictures.rglob("*.png"))
    kinds = {"original": Original, "diffusers": Diffusers}
    return {name: kind(stage.net.unet, stage.vae(), files, batch) for name, kind in kinds.items()}


def recipes(usual: dict[str, Recipe], stages: dict[str, DiffusionStage]) -> dict[str, Any]:
    """What takes turns: whole steps, and the parts whose share is asked for."""
    original, stage = usual["original"], stages["ours, bf16"]
    x, batches = original.read(), stage.batches(10**6)
    found = {name: recipe.step for name, recipe in usual.items()}
    found |= {name: Stepping(stage) for name, stage in stages.items()}
    return found | {"read": original.read, "encode": lambda: original.encode(x), "wait": lambda: next(batches)}


class Stepping:
    """Calls of a stage's step, each with the next batch."""

    def __init__(self, stage: DiffusionStage, start: int = 2000):
        self.stage, self.at = stage, start  # long after the beginning, where averages are exact from step to step
        self.batches = stage.batches(start)

    def __call__(self) -> None:
        """One step."""
        self.stage.step(next(self.batches), self.at)
        self.at += 1


def report(preset: str, batch: int, size: int, seconds: dict[str, list[float]]) -> list[Figure]:
    """Images a second, ratios and shares."""
    where = f"{preset}, {size}x{size}, batch {batch}"
    ours = [name for name in seconds if name.startswith("ours")]
    found = [rate(f"{where}: {name}", batch, seconds[name]) for name in ("original", "diffusers", *ours)]
    best = min((name for name in ours if "average" not in name), key=lambda name: median(seconds[name]))
    for base in ("original", "diffusers"):
        for name in ours:
            goal = GOALS.get((name, base)) if preset == "base" else None
            found.append(of_ratio(f"{where}: {name} / {base}", times_as_fast(seconds[base], seconds[name]), goal))
        goal = GOALS.get(("best", base)) if preset == "base" else None
        ratio = times_as_fast(seconds[base], seconds[best])
        found.append(of_ratio(f"{where}: best / {base}", ratio, goal, f"best is {best}"))
    for part in ("encode", "read"):
        share = median(seconds[part]) / median(seconds["original"])
        found.append(Figure(f"{where}: share of the original's step: {part}", 100 * share, "%"))
    share = median(seconds["wait"]) / median(seconds["ours, bf16"])
    name = f"{where}: waiting for latents, share of our step in bf16"
    return [*found, Figure(name, 100 * share, "%", 100 * MOST_WAITING, True, how="the next batch, read in the step")]


def rate(name: str, batch: int, seconds: list[float]) -> Figure:
    """Images a second with their spread."""
    rates = batch / torch.tensor(seconds, dtype=torch.float64)
    low, middle, high = rates.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Figure(name, middle, "images/s", low=low, high=high)


# What follows the gradients


def of_update(rounds: int) -> list[Figure]:
    """Clipping, AdamW and the average of a UNet's weights, with gradients that are there already."""
    unet = UNet2DModel(**UPDATED)
    gradients = [torch.randn_like(p, device=device()) for p in unet.parameters()]
    scale = 0.5 / torch.stack([g.norm() for g in gradients]).norm()  # a usual norm, below the one that is clipped
    gradients = [g * scale for g in gradients]
    kinds = {
        "diffusers": DiffusersUpdate,
        "ours, one average": partial(Ours, 1),
        "ours, two averages": partial(Ours, 2),
    }
    work = {}
    for name, kind in kinds.items():
        network = copy_of(unet).to(device())
        work[name] = partial(rounds_of, network, gradients, kind(network))
    seconds = take_turns(work, rounds)
    millions = sum(g.numel() for g in gradients) / 1e6
    found = []
    for name, values in seconds.items():
        taken = median(values) / EACH
        found.append(
            Figure(f"clipping, optimiser, average: {name}", 1000 * taken, "ms", how=f"{millions:.1f} M parameters")
        )
    for name in list(seconds)[1:]:
        ratio = times_as_fast(seconds[name], seconds["diffusers"])
        goal = MOST_OF_UPDATE if name.endswith("one average") else None
        how = "as many averages as diffusers keeps" if goal else "what train-diffusion keeps by default"
        found.append(
            Figure(f"the same, share of diffusers': {name}", ratio.median, "x", goal, True, ratio.low, ratio.high, how)
        )
    return found


def rounds_of(network: nn.Module, gradients: list[Tensor], update: Callable[[], None]) -> None:
    """A few updates after one another, since not all need be alike."""
    for _ in range(EACH):
        for p, gradient in zip(network.parameters(), gradients, strict=True):
            p.grad = gradient
        update()


class Ours:
    """What a stage does with its gradients, late in a run."""

    def __init__(self, averages: int, network: nn.Module):
        self.network, self.accelerator, self.at = network, accelerator("fp32"), 2000
        settings = DiffusionSettings(latents="unused", out="unused")
        optimizer = loop.make_optimizer(network, settings, settings.lr)
        self.prepared, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.averages = [PowerEma(network, width) for width in (0.05, 0.1)[:averages]]

    def __call__(self) -> None:
        """What follows the gradients."""
        norm = loop.update(self.accelerator, self.prepared, self.optimizer, 1.0)
        self.at += 1
        for average in self.averages:
            average.update(self.network, self.at, norm.isfinite())


if __name__ == "__main__":
    sys.exit(main())
