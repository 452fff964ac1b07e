"""How near the samplers come to the exact distribution in how many evaluations, and with a trained run.

    python -m benchmarks.samplers                  # with the exact denoiser of a Gaussian mixture, every pair
    python -m benchmarks.samplers --run RUN -n 500 # with a trained run: distance to held-out pictures at the same seeds

The first is free of any training: latents of 64 numbers from a known mixture of ten Gaussians, whose best network is a
formula. Beside the table stands how many evaluations the default sampler needs, from there on, to be as near as DDIM
with 200 steps (+1 %) and with 50 as latent diffusion was published with it, from the same noise. The second compares
each sampler with Heun's 100 steps (199 evaluations): the distances of both to held-out pictures, and of one to the
other, in the features of a network of the run's own pictures.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.figures import Figure, conclude
from benchmarks.sample_baselines import STEPS as STOCK
from benchmarks.sample_baselines import ddim
from benchmarks.timing import one_thread
from calotype import device
from calotype.data import Pictures, evenly_spaced
from calotype.features import FeatureNetwork
from calotype.metrics import Moments, frechet_distance, kernel_distance, moments
from calotype.own_features import own
from calotype.pipeline.generate import load
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.samplers import SAMPLERS, make_scheduler
from calotype.sheet import read_sheet

_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# What may have been trained: the config of the scheduler that is saved with it.
TRAINED: dict[str, dict[str, Any]] = {
    "flow": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    "epsilon": {"prediction_type": "epsilon", **_BETAS},
    "v": {"prediction_type": "v_prediction", **_BETAS},
    "x0": {"prediction_type": "sample", **_BETAS},
    "v, zero SNR": {"prediction_type": "v_prediction", **_BETAS, **_ZERO_SNR},
    "x0, zero SNR": {"prediction_type": "sample", **_BETAS, **_ZERO_SNR},
}
STEPS = {"ddim": (15, 100), "euler": (15, 100), "dpm++2m": (12, 15, 18), "unipc": (10, 12, 15), "heun": (8, 50)}
GOALS = {"DDIM-200": (1.01, 15), "DDIM-50": (1.0, 8)}  # room for its distance, and evaluations at most
_COUNTS = range(4, 21)
_WITH_A_RUN = ("unipc:10", "unipc:12", "unipc:15", "dpm++2m:15", "dpm++2m:18", "heun:8", "euler:15")


class Mixture:
    """The best network for latents (B, d) or (B, c, h, w) from Gaussians N(mu_k, diag var_k), equally many of each."""

    def __init__(self, trained: dict[str, Any], mu: Tensor, var: Tensor):
        self.mu, self.var = mu, var
        self.predicted = trained["prediction_type"]
        self.log_sigmas = None
        if self.predicted != "flow_prediction":
            chain = DPMSolverMultistepScheduler(**trained).alphas_cumprod
            self.log_sigmas = ((1 - chain) / chain).log() / 2

    def path(self, t: float) -> tuple[float, float]:
        """alpha and sigma at a time, also between those of the chain."""
        if self.log_sigmas is None:
            return 1 - t / 1000, t / 1000
        low = min(int(t), 998)
        between = torch.lerp(self.log_sigmas[low], self.log_sigmas[low + 1], t - low).exp().item()
        return 1 / math.hypot(1, between), between / math.hypot(1, between)

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        """What was trained: eps, v, x0 or the flow, from z at time t."""
        alpha, sigma = self.path(float(t))
        x, mu, var = z.flatten(1).double(), self.mu.double(), self.var.double()
        total, at = alpha**2 * var + sigma**2, alpha * mu
        likelihood = x @ (at / total).T - (x**2 @ (1 / total).T + (at**2 / total + total.log()).sum(1)) / 2
        share, gain = likelihood.softmax(1), alpha * var / total
        x0 = (share @ (mu - gain * at) + x * (share @ gain)).view_as(z).to(z.dtype)
        eps = (z - alpha * x0) / max(sigma, 1e-8)
        flow = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}
        return flow.get(self.predicted, eps - x0)

    def moments(self) -> Moments:
        """Mean and covariance as they are, as if from very many samples."""
        n, mean = 1e9, self.mu.double().mean(0)
        cov = self.var.double().mean(0).diag() + (self.mu - mean).T @ (self.mu - mean) / len(self.mu)
        moments = Moments(len(mean))
        rows = torch.cat([torch.ones(1).double(), mean])
        moments.total = n * torch.outer(rows, rows)
        moments.total[1:, 1:] += (n - 1) * cov
        return moments

    @classmethod
    def example(cls, trained: dict[str, Any], d: int = 64) -> "Mixture":
        """Ten Gaussians of different widths, about one unit of variance in all."""
        g = torch.Generator().manual_seed(0)
        mu = 0.7 * torch.randn(10, d, generator=g)
        return cls(trained, mu, (torch.rand(10, d, generator=g) + 0.05) ** 2)


def walk(model: Mixture, scheduler: SchedulerMixin, steps: int, z: Tensor) -> tuple[Tensor, int]:
    """Clean latents from standard noise, and how often the network was evaluated."""
    scheduler.set_timesteps(steps)
    z = z * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
        z = scheduler.step(model(x, t), t, z).prev_sample
    return z, len(scheduler.timesteps)


class Row(NamedTuple):
    """One line of a table."""

    trained: str
    sampler: str
    steps: int
    evaluations: int
    distance: float
    relative: float  # to that of the reference
    to_reference: float
    seconds: float


def exact(n: int) -> list[Row]:
    """Every sampler on everything that may have been trained, with the exact mixture."""
    z, rows = torch.randn(n, 64, generator=torch.Generator().manual_seed(1)), []
    for name, trained in TRAINED.items():
        model = Mixture.example(trained)
        truth = model.moments()
        reference = moments(walk(model, make_scheduler(trained, "heun"), 100, z)[0])
        base = frechet_distance(reference, truth)
        rows.append(Row(name, "heun", 100, 199, base, 1.0, 0.0, 0.0))
        for sampler in SAMPLERS:
            for steps in STEPS[sampler]:
                began = time.process_time()
                x, evaluations = walk(model, make_scheduler(trained, sampler), steps, z)
                seconds, found = time.process_time() - began, frechet_distance(moments(x), truth)
                apart = frechet_distance(moments(x), reference)
                rows.append(Row(name, sampler, steps, evaluations, found, found / base, apart, seconds))
    return rows


def needed(n: int) -> list[Figure]:
    """How many evaluations of the default sampler come as near as DDIM on the same mixture."""
    draws = [torch.randn(n, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)]
    published, found = TRAINED["epsilon"], []
    theirs = {name: nearness(published, partial(ddim, published), STOCK[name], draws) for name in GOALS}
    for name in ("flow", "epsilon"):
        trained = TRAINED[name]
        ours = {s: nearness(trained, partial(make_scheduler, trained, "unipc"), s, draws) for s in _COUNTS}
        for other, (room, goal) in GOALS.items():
            count = first_from(ours, room * theirs[other])
            how = (
                f"{theirs[other]:.4f} there, UniPC-{count} {ours.get(count, math.nan):.4f}; n={n:,}, {len(draws)} draws"
            )
            found.append(Figure(f"{name}: evaluations as near as {other}", count, "", goal, True, how=how))
    return found


def nearness(
    trained: dict[str, Any], scheduler: Callable[[], SchedulerMixin], steps: int, draws: list[Tensor]
) -> float:
    """The mean distance to the mixture over draws of noise (n, d)."""
    model = Mixture.example(trained)
    truth = model.moments()
    return fmean(frechet_distance(moments(walk(model, scheduler(), steps, z)[0]), truth) for z in draws)


def first_from(distances: dict[int, float], goal: float) -> int:
    """The least count from which on all distances reach the goal; one more than the largest where none does."""
    too_far = [count for count, distance in distances.items() if distance > goal]
    return max(too_far, default=min(distances) - 1) + 1


class Judge(NamedTuple):
    """Held-out pictures as features (m, d), and what makes such features of pictures."""

    network: FeatureNetwork
    real: Tensor

    @classmethod
    def of(cls, run: Path, precision: str) -> "Judge":
        """In the features of a small network that knows the run's own pictures."""
        network = own(read_sheet(run / "data.json"), run / "evaluation" / "own", precision).network
        return cls(network, network.of(_held_out(run), device.device()))

    def distance(self, made: Tensor) -> float:
        """Frechet distance of features (n, d) to those of the held-out pictures."""
        return frechet_distance(moments(made), moments(self.real))


def trained_run(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """The samplers with a trained model, against its held-out pictures; kernel distances beside them."""
    run, judge, pipe = arguments.run, Judge.of(arguments.run, arguments.precision), load(arguments.run)
    rows, kernel, reference, base = [], {}, None, None
    for sampler, steps in [("heun", arguments.reference), *(_parsed(word) for word in arguments.samplers)]:
        began = time.process_time()
        x = _draw(pipe, sampler, steps, arguments)
        seconds = time.process_time() - began
        made = judge.network.of(x.split(64), pipe.device)
        found = judge.distance(made)
        reference, base = (made, found) if reference is None else (reference, base)
        kernel[f"{sampler} {steps}"] = kernel_distance(made, judge.real)
        apart = frechet_distance(moments(made), moments(reference))
        evaluations = 2 * steps - 1 if sampler == "heun" else steps
        rows.append(Row(run.name, sampler, steps, evaluations, found, found / base, apart, seconds))
    return rows, kernel


def _parsed(word: str) -> tuple[str, int]:
    """`unipc:15` -> ("unipc", 15)."""
    name, _, steps = word.partition(":")
    return name, int(steps)


def _held_out(run: Path, most: int = 5000) -> list[Tensor]:
    pictures = Pictures(read_sheet(run / "data.json"), "val")
    items = evenly_spaced(len(pictures), most)
    return [torch.stack([pictures[i] for i in items[start : start + 64]]) for start in range(0, len(items), 64)]


def _draw(pipe: LatentDiffusionPipeline, sampler: str, steps: int, arguments: argparse.Namespace) -> Tensor:
    """Pictures uint8 (n, C, H, W); classes take turns."""
    parts, n = [], arguments.n
    for start in range(0, n, 250):
        count = min(250, n - start)
        labels = [pipe.labels[(start + i) % len(pipe.labels)] for i in range(count)] if pipe.labels else None
        with device.autocast(arguments.precision):
            order = {
                "seed": start,
                "guidance_scale": arguments.guidance,
                "num_inference_steps": steps,
                "sampler": sampler,
                "output_type": "pt",
            }
            parts.append(pipe(labels, count, **order).images)
    return (torch.cat(parts).float() * 255).round().to(torch.uint8).cpu()


def show(rows: list[Row]) -> None:
    """The table."""
    table = Table("trained", "sampler", "steps", "evaluations", "distance", "of Heun's", "to Heun's", "CPU s")
    for row in rows:
        numbers = f"{row.distance:.4f}", f"{row.relative:.3f}", f"{row.to_reference:.4f}", f"{row.seconds:.1f}"
        table.add_row(row.trained, row.sampler, str(row.steps), str(row.evaluations), *numbers)
    Console(width=110).print(table)


def main() -> int:
    """Measure, print a table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run; without one the exact mixture is drawn from")
    parser.add_argument("-n", type=int, default=2000, help="samples of a row")
    parser.add_argument("--guidance", type=float, help="scale of all rows (default: the model's)")
    parser.add_argument("--reference", type=int, default=100, help="steps of Heun's method that all is compared with")
    parser.add_argument("--samplers", nargs="+", default=_WITH_A_RUN, help="SAMPLER:STEPS that are compared")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    arguments = parser.parse_args()
    one_thread()
    rows, kernel = trained_run(arguments) if arguments.run else (exact(arguments.n), {})
    show(rows)
    figures = of_run(rows, kernel) if arguments.run else needed(arguments.n)
    return conclude("samplers", figures, vars(arguments), {"rows": [row._asdict() for row in rows]})


def of_run(rows: list[Row], kernel: dict[str, float]) -> list[Figure]:
    """Each sampler's distance over that of the reference."""
    return [
        Figure(f"{row.sampler} {row.steps}", row.relative, "x", how=f"kernel distance {value:.4g}")
        for row, value in zip(rows, kernel.values(), strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
