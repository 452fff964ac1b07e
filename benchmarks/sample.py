"""Time to one image: the pipeline as it is by default against the usual samplers, at no greater Fréchet distance.

    calotype distill RUN
    calotype train-diffusion --latents RUN/latents --objective epsilon --density uniform --out USUAL
    python -m benchmarks.sample --run RUN --usual USUAL

USUAL is stage 2 as latent diffusion was published, a network of the same size for noise prediction on the same latents,
drawn from in fp32 with stock schedulers and the full decoder: DDIM-200 and PLMS-20 (the original's), DDIM-50 (that of
diffusers' scripts). Ours is RUN's flow with its own sampler and precision in --evaluations, with the full and the tiny
decoder, and the few-step student. All are timed under the run's guidance and take turns on one thread, CPU time, or a
GPU's clock. Distances are to all held-out pictures in the features of a small network of the run's own pictures,
each side's the least over guidance scales; samples for them are drawn in our precision on both sides, and kept in
--samples for others to judge.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from benchmarks import sample_baselines, timing
from benchmarks.figures import Figure, conclude, of_ratio
from benchmarks.objectives import Judge, write
from benchmarks.sample_baselines import STEPS, stock_scheduler
from calotype import device
from calotype.pipeline.export import assemble
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.model_folder import load_scheduler
from calotype.weights import load_network

OURS: dict[str, dict[str, Any]] = {
    "ours": {"decoder": "full"},
    "ours, tiny decoder": {"decoder": "tiny"},
    "ours, fewer": {"decoder": "full"},
    "ours, student": {"fast": True, "decoder": "tiny"},
}
# Times as fast as whom. Fewer evaluations are set against what fewer are as near as (benchmarks.samplers).
GOALS = {
    ("ours", "DDIM-200"): 10.0,
    ("ours, tiny decoder", "DDIM-200"): 15.0,
    ("ours, fewer", "DDIM-50"): 6.0,
    ("ours, fewer", "PLMS-20"): 2.0,
    ("ours, student", "DDIM-200"): 50.0,
}
FURTHER = {"ours, student": 1.15}  # of the distance of the usual one
_NO_FURTHER = 1.02
_DRAWN_AT_ONCE = 64

Work = Callable[[], Tensor]


def main() -> int:
    """Time, draw, judge; print the table and the JSON."""
    args = parsed()
    timing.one_thread()
    sides = Sides(args)
    figures = []
    for batch in args.batches:
        figures += times(sides, batch, args.rounds if batch == 1 else max(2, args.rounds // 3))
    if args.n:
        figures += distances(sides, args)
    return conclude("sample", figures, vars(args))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run, with distilled/ for the student")
    parser.add_argument("--usual", type=Path, required=True, help="stage 2 trained with --objective epsilon")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5], help="of guidance, tried on both sides")
    parser.add_argument("--evaluations", type=int, default=10, help="of ours, to be as near as DDIM-200")
    parser.add_argument("--fewer", type=int, default=6, help="of ours, to be as near as DDIM-50")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=6, help="of timing at batch 1; a third of them above")
    parser.add_argument("-n", type=int, default=500, help="samples of each distance (0: none)")
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS), help="distances of which of ours")
    parser.add_argument(
        "--against", nargs="+", choices=STEPS, default=list(STEPS), help="distances of which usual ones"
    )
    parser.add_argument("--samples", type=Path, help="folder to keep the samples in")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of ours")
    parser.add_argument("--compile", action="store_true", help="compile our networks first, which takes minutes")
    return parser.parse_args()


class Sides:
    """The networks of both sides, and how each way draws."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.pipe = args, prepared(args)
        self.guidance = self.pipe.default_guidance
        where, flag = device.device(), "--usual"
        self.usual = load_network(UNet2DModel, args.usual / "unet", flag).to(where).eval()
        self.config = load_scheduler(args.usual / "scheduler", flag).config
        self.vae = assemble(args.run).vae.to(where).eval()  # in its stock form
        self.distilled = self.pipe.student is not None and self.pipe.tiny_decoder is not None

    def ways(self) -> list[str]:
        """All ways to draw, the usual ones first."""
        return [*STEPS, *(name for name in OURS if self.distilled or OURS[name] == {"decoder": "full"})]

    def work(self, way: str, count: int, seed: int, precision: str = "fp32") -> Work:
        """A function that draws so many pictures (B, C, H, W) in [0, 1]; `precision` is that of a usual way."""
        if way in STEPS:
            return partial(self._usual, way, count, seed, precision)
        steps = self.args.fewer if way == "ours, fewer" else self.args.evaluations
        return partial(self._ours, OURS[way], steps, count, seed)

    def _ours(self, arguments: dict[str, Any], steps: int, count: int, seed: int) -> Tensor:
        names = self.pipe.labels
        labels = [names[(seed + i) % len(names)] for i in range(count)] if names else None
        order = {"seed": seed, "output_type": "pt"} | arguments
        if not arguments.get("fast"):
            order |= {"guidance_scale": self.guidance, "num_inference_steps": steps}
        with device.autocast(self.args.precision):
            return self.pipe(labels, count, **order).images

    def _usual(self, way: str, count: int, seed: int, precision: str) -> Tensor:
        z = self.pipe.prepare_latents([torch.Generator().manual_seed(seed + i) for i in range(count)])
        classes = len(self.pipe.labels)
        ids = [*((seed + i) % classes for i in range(count)), *[classes] * count] if classes else None
        labels = None if ids is None else torch.tensor(ids, device=z.device)
        scheduler = stock_scheduler(way, self.config)
        with device.autocast(precision):
            x = sample_baselines.draw(self.usual, self.vae, scheduler, z, labels, self.guidance)
        return x.float() / 2 + 0.5


def prepared(args: argparse.Namespace) -> LatentDiffusionPipeline:
    """The run's pipeline in the form in which it draws."""
    pipe = assemble(args.run).to(device.device())
    for part in filter(None, (pipe.unet, pipe.student, pipe.vae, pipe.tiny_decoder)):
        device.for_drawing(part, compiled=args.compile)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def times(sides: Sides, batch: int, rounds: int) -> list[Figure]:
    """How many times as fast ours are, drawing so many pictures at once."""
    taken = timing.take_turns({way: sides.work(way, batch, 0) for way in sides.ways()}, rounds)
    found = []
    for way in sides.ways():
        each = timing.median(taken[way]) / batch
        found.append(Figure(f"{way}: an image, batch {batch}", 1000 * each, "ms"))
    for ours in (way for way in sides.ways() if way in OURS):
        for other in STEPS:
            ratio = timing.times_as_fast(taken[other], taken[ours])
            name = f"{ours} against {other}, batch {batch}"
            found.append(of_ratio(name, ratio, GOALS.get((ours, other)), f"{rounds} rounds"))
    return found


def distances(sides: Sides, args: argparse.Namespace) -> list[Figure]:
    """Distances to held-out pictures, and how much further ours are than the usual ones."""
    judge, found, figures = Judge(args.run), {}, []
    for way in (way for way in sides.ways() if way in args.ours or way in args.against):
        scales = [sides.pipe.default_guidance] if OURS.get(way, {}).get("fast") else args.scales
        by_scale = {scale: distance(sides, way, scale, judge) for scale in scales}
        best = min(by_scale, key=by_scale.get)
        found[way] = by_scale[best]
        others = "".join(f", {value:.3g} at {scale:g}" for scale, value in by_scale.items() if scale != best)
        figures.append(Figure(f"{way}: distance", found[way], "", how=f"n={args.n:,}, guidance {best:g}{others}"))
        print(figures[-1], flush=True)
    for ours in (way for way in found if way in OURS):
        for other in args.against:
            goal = FURTHER.get(ours, _NO_FURTHER) if (ours, other) in GOALS else None
            figures.append(
                Figure(f"{ours}: distance over that of {other}", found[ours] / found[other], "x", goal, True)
            )
    return figures


def distance(sides: Sides, way: str, scale: float, judge: Judge) -> float:
    """That of a way's samples at a guidance scale to the held-out pictures."""
    sides.guidance = scale
    x = drawn(sides, way, sides.args)
    if sides.args.samples:
        write(x, sides.pipe.labels, sides.args.samples / f"{way.replace(', ', '-').replace(' ', '_')}-g{scale:g}")
    return judge.score(x, len(x))["fid[own]"]


def drawn(sides: Sides, way: str, args: argparse.Namespace) -> Tensor:
    """Pictures uint8 (n, C, H, W) on the CPU, seeds and classes in turn."""
    parts = []
    for start in range(0, args.n, _DRAWN_AT_ONCE):
        count = min(_DRAWN_AT_ONCE, args.n - start)
        x = sides.work(way, count, start, args.precision)()
        parts.append((x.clamp(0, 1) * 255).round().byte().cpu())
    return torch.cat(parts)


if __name__ == "__main__":
    sys.exit(main())
