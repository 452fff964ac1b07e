"""Ways of distilling a few-step student at equal CPU time: the trial that `calotype distill` was chosen by.

    python -m benchmarks.distillers --run RUN --cpu-seconds 120

Each way trains a copy of the teacher on one thread until its CPU time is spent, and its averaged weights are drawn with
by three samplers in 1, 2 and 4 evaluations: `deterministic` (DDIM), `part` (part of the noise is new, as the student is
saved) and `scratch` (all of it is new; flow alone). The Fréchet distance is given over that of the teacher's default.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchLCMScheduler, SchedulerMixin
from torch import Tensor, nn

from benchmarks.fewstep import Way, distances, drawn
from calotype import device
from calotype.config import parse
from calotype.data import Batch, Pictures
from calotype.features import gradients
from calotype.own_features import own
from calotype.pace import learning_rate_factor
from calotype.pipeline.export import assemble
from calotype.pipeline.references import reference
from calotype.randomness import normal, uniform
from calotype.sheet import read_sheet
from calotype.stage2_diffusion.consistency import Consistency
from calotype.stage2_diffusion.denoiser import Given
from calotype.stage2_diffusion.distill import FinishedRun, StudentStage
from calotype.stage2_diffusion.distill_config import DistillSettings
from calotype.stage2_diffusion.objectives import Objective

_SEGMENTS, _MIDPOINTS = 4, 2


class SelfConsistent(StudentStage):
    """Consistency against the student's own newest weights (Song & Dhariwal 2024)."""

    def __init__(self, *args):
        super().__init__(*args)
        self.target = self.net


class MeanVelocity(StudentStage):
    """The teacher's mean velocity over each of four segments, by midpoint steps (Salimans & Ho 2022, all at once)."""

    def __init__(self, *args):
        super().__init__(*args)
        self.grid = Consistency(Objective(self.trained), _SEGMENTS)

    def errors(self, net: nn.Module, batch: Batch, given: Given, purpose: str) -> Tensor:
        """Squared errors (B,) of the velocity with which a step of the deterministic sampler goes."""
        seed, z, start = self.settings.seed, batch.x, batch.start
        eps = normal(seed, f"{purpose} noise", start, len(z), tuple(z.shape[1:])).to(z.device)
        i = (uniform(seed, f"{purpose} place", start, len(z)) * _SEGMENTS).long()
        y = self.grid.point(z, eps, i)
        said = self.grid.coordinates.velocity(net, y, self.grid.u[i].to(z), self.grid.t[i].to(z.device), given)
        with device.autocast(self.settings.precision):
            target = self.mean_velocity(y, i, given)
        return (said - target).square().flatten(1).mean(1)

    @torch.no_grad()
    def mean_velocity(self, y: Tensor, i: Tensor, given: Given) -> Tensor:
        """That of the teacher's curve through y (B, c, h, w) over the segments i (B,)."""
        u, end = self.grid.u[i].to(y), self.grid.u[i + 1].to(y)
        h, total = (end - u) / _MIDPOINTS, torch.zeros_like(y)
        for k in range(_MIDPOINTS):
            total += self._midpoint(y + h[:, None, None, None] * total, u + k * h, h, given)
        return total / _MIDPOINTS

    def _midpoint(self, y: Tensor, u: Tensor, h: Tensor, given: Given) -> Tensor:
        path, half = self.grid.coordinates, h[:, None, None, None] / 2
        slope = path.velocity(self.teacher, y, u, path.time(u), given)
        return path.velocity(self.teacher, y + half * slope, u + h / 2, path.time(u + h / 2), given)


WAYS = {
    "consistency": (StudentStage, ("deterministic", "part", "scratch")),
    "consistency, no slow copy": (SelfConsistent, ("part",)),
    "mean velocity, 4 segments": (MeanVelocity, ("deterministic",)),
}


def main() -> int:
    """Train, draw, compare; print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run")
    parser.add_argument("--cpu-seconds", type=float, default=120)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("-n", type=int, default=1000, help="samples of each")
    parser.add_argument("--seed", type=int, default=1000, help="of the first sample")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    sheet = read_sheet(args.run / "data.json")
    networks = [own(sheet, args.run / "evaluation" / "own", args.precision).network, gradients()]
    real = {n.name: reference(args.run / "evaluation", "val", Pictures(sheet, "val"), n) for n in networks}
    pipe = assemble(args.run).to(device.device())
    device.for_drawing(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    x = drawn(pipe, Way("teacher", pipe.default_steps, 0, 0, {}), args)
    teacher = {key: value for n in networks for key, value in distances(n, real[n.name], x, None).items()}
    print(f"{'way':28} {'steps':>6} {'sampler':14} {'evaluations':>11}" + "".join(f" {n.name:>10}" for n in networks))
    rows = []
    for name in args.only:
        stage, steps = trained(*WAYS[name][:1], args)
        for sampler in WAYS[name][1]:
            for count in (1, 2, 4):
                x = few(stage, sampler, count, args)
                found = {key: value for n in networks for key, value in distances(n, real[n.name], x, teacher).items()}
                rows.append({"way": name, "steps": steps, "sampler": sampler, "evaluations": count} | found)
                ratios = "".join(f" {found[f'ratio[{n.name}]']:10.2f}" for n in networks)
                print(f"{name:28} {steps:6} {sampler:14} {count:11}{ratios}", flush=True)
    print(json.dumps({"run": str(args.run), "cpu_s": args.cpu_seconds, "n": args.n, "teacher": teacher, "rows": rows}))
    return 0


def trained(kind: type[StudentStage], args: argparse.Namespace) -> tuple[StudentStage, int]:
    """A stage whose CPU time is spent, and the optimiser steps that it took."""
    with tempfile.TemporaryDirectory() as out:
        words = [str(args.run), "--out", out, "--precision", args.precision, "--lr", str(args.lr)]
        settings = parse(DistillSettings, words, "distill")
        accelerator = device.accelerator(settings.precision)
        stage = kind(settings.of_student(), FinishedRun(settings, accelerator.device), accelerator)
    batches, step, began = stage.batches(0), 0, time.process_time()
    while (progress := (time.process_time() - began) / args.cpu_seconds) < 1:
        for group in stage.optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_factor(settings, step, progress)
        stage.step(next(batches), step)
        step += 1
    return stage, step


def few(stage: StudentStage, sampler: str, count: int, args: argparse.Namespace) -> Tensor:
    """Pictures (n, C, H, W) in [-1, 1] in `count` evaluations."""
    pipe = stage.pipeline()
    pipe.scheduler = scheduler_of(stage.sampler, sampler, count)
    return drawn(pipe, Way(sampler, count, 1.0, count, {"num_inference_steps": count}), args)


def scheduler_of(saved: DPMSolverMultistepScheduler, sampler: str, count: int) -> SchedulerMixin:
    """The saved sampler, or one of the others on the same grid."""
    if sampler == "deterministic":
        return DPMSolverMultistepScheduler.from_config(saved.config, algorithm_type="dpmsolver++")
    if sampler == "scratch":
        return FlowMatchLCMScheduler(shift_terminal=1 / count if count > 1 else None)
    return saved


if __name__ == "__main__":
    sys.exit(main())
