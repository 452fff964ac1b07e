"""Objectives, weights, times and optimisers of stage 2 at equal CPU time: distance of samples against seconds.

    python -m benchmarks.objectives --run RUN --cpu-seconds 120 --seeds 3 --out DIR
    python -m benchmarks.objectives --run RUN --only flow "v, min-SNR" …

RUN holds the latents and the autoencoder that all variants share. Each is trained on one thread until its CPU time is
spent, with a learning rate that follows that clock; drawing does not count. Samples are scored in the features of a
small network trained on the run's own pictures, and kept in DIR/VARIANT/SEED/SECONDS/GUIDANCE/CLASS/*.png for others to
judge. The last line is the result as JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from calotype import device, own_features
from calotype.config import parse
from calotype.data import Pictures
from calotype.metrics import frechet_distance, kernel_distance, moments
from calotype.pace import learning_rate_factor
from calotype.sheet import read_sheet
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.train import DiffusionStage

VARIANTS: dict[str, list[str]] = {
    "flow": [],
    "flow, times about the middle": ["--time-mean", "0"],
    "flow, uniform times": ["--density", "uniform"],
    "flow, mode times": ["--density", "mode"],
    "flow, EDM weights and times": ["--weighting", "edm", "--time-mean", "-1.2", "--time-std", "1.2"],
    "flow, learned uncertainty": ["--weighting", "uncertainty"],
    "flow, Muon": ["--optimizer", "muon"],
    "v": ["--objective", "v"],
    "v, min-SNR": ["--objective", "v", "--weighting", "min-snr"],
    "v, logit-normal times": ["--objective", "v", "--density", "logit-normal"],
    "v, zero terminal SNR": ["--objective", "v", "--zero-terminal-snr"],
    "epsilon": ["--objective", "epsilon"],
    "epsilon, min-SNR": ["--objective", "epsilon", "--weighting", "min-snr"],
    "x0": ["--objective", "x0"],
    # The settings that latent diffusion was published with, for runs a thousand times as long.
    "published": "--objective epsilon --lr 1e-4 --lr-schedule constant --ema-width 0.01".split(),
}
_COMPARED = 1000  # samples of a Fréchet distance
_CURVE, _CURVE_SAMPLES = (0.25, 0.5), 500  # shares of the time at which samples are drawn at guidance 1


def main() -> int:
    """Train, draw, score; print a table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run whose latents and autoencoder are there")
    parser.add_argument("--out", type=Path, required=True, help="folder of the samples and results.jsonl")
    parser.add_argument("--cpu-seconds", type=float, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("-n", type=int, default=1000, help="samples drawn at the end; 500 on the way there")
    parser.add_argument("--steps", type=int, default=20, help="evaluations of the sampler")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5], help="scales at the end of training")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="flags for every variant")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    judge = Judge(args.run)
    rows = []
    for seed in range(args.seeds):
        for name in args.only:
            rows += Trial(args, name, seed, judge).rows()
            with (args.out / "results.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows[-len(_CURVE) - len(args.guidance) :])
    print_table(rows, args)
    print(json.dumps(rows))
    return 0


class Judge:
    """Distances to the held-out pictures in the features of a network trained on the training pictures."""

    def __init__(self, run: Path):
        sheet = read_sheet(run / "data.json")
        self.network = own_features.own(sheet, run / "evaluation" / "own", "auto").network
        pictures = Pictures(sheet, "val")
        batches = (torch.stack([pictures[i] for i in part]) for part in torch.arange(len(pictures)).split(500))
        self.reference = self.network.of(batches, device.device())

    def score(self, x: Tensor, compared: int = _COMPARED) -> dict[str, float]:
        """Fréchet distance of so many of uint8 pictures (n, C, H, W), for it falls with n, and kernel distance."""
        features = self.network.of(x.split(500), device.device())
        return {
            "fid[own]": frechet_distance(moments(features[:compared]), moments(self.reference)),
            "kid[own]": kernel_distance(features, self.reference),
        }


class Trial:
    """One variant with one seed."""

    def __init__(self, args, name: str, seed: int, judge: Judge):
        self.args, self.name, self.seed, self.judge = args, name, seed, judge
        self.stage = make_stage(args.run, seed, [*VARIANTS[name], *args.more])

    def rows(self) -> list[dict]:
        """Train to the end of the time, with a look at the samples on the way."""
        found, end = [], self.args.cpu_seconds
        marks = [share * end for share in _CURVE]
        for step, spent in train(self.stage, end):
            if marks and spent >= marks[0]:
                found.append(self._row(marks.pop(0), step, 1.0, _CURVE_SAMPLES))
        return found + [self._row(end, step, guidance, self.args.n) for guidance in self.args.guidance]

    def _row(self, seconds: float, step: int, guidance: float, count: int) -> dict:
        x = draw(self.stage, guidance, count, self.args.steps, 100_000 * (1 + self.seed))
        folder = self.args.out / self.name.replace(" ", "_") / f"{self.seed}" / f"{seconds:.0f}s" / f"g{guidance}"
        write(x, self.stage.class_names, folder)
        row = {"variant": self.name, "seed": self.seed, "cpu_seconds": seconds, "steps": step, "guidance": guidance}
        row |= {"n": count, "evaluations": self.args.steps, "samples": str(folder)} | self.judge.score(x)
        print(row, flush=True)
        return row


def make_stage(run: Path, seed: int, words: list[str]) -> DiffusionStage:
    """Stage 2 as flags say, on the latents and the autoencoder of a run; it writes nothing."""
    latents, vae = run / "latents", run / "stage1_vae" / "vae"
    words = ["--latents", latents, "--vae", vae, "--out", "unused", "--seed", seed, "--steps", 1_000_000, *words]
    settings = parse(DiffusionSettings, [str(word) for word in words], "objectives")
    return DiffusionStage(settings, vae, device.accelerator("auto"))


def train(stage: DiffusionStage, seconds: float) -> Iterator[tuple[int, float]]:
    """Steps, and seconds that they have taken, one pair a step; the learning rate follows that clock to its end."""
    batches, spent, step = stage.batches(0), 0.0, 0
    while spent < seconds:
        set_learning_rate(stage, step, min(spent / seconds, 1))
        began = now()
        stage.step(next(batches), step)
        step, spent = step + 1, spent + now() - began
        yield step, spent


def set_learning_rate(stage: DiffusionStage, step: int, progress: float) -> None:
    """What the loop would set before a step, at that share of the run."""
    for group in stage.optimizer.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * learning_rate_factor(stage.settings, step, progress)


def now() -> float:
    """CPU seconds of this process; where a GPU does the work, seconds on the wall once it has done all."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def draw(stage: DiffusionStage, guidance: float, count: int, steps: int, seed: int) -> Tensor:
    """Pictures uint8 (n, C, H, W) from seeds that follow each other, the classes in turn."""
    pipe, drawn = stage.pipeline(), []
    classes = len(stage.class_names)
    order = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    for start in range(0, count, 250):
        here = min(250, count - start)
        labels = [(start + i) % classes for i in range(here)] if classes else None
        with device.autocast("auto"):
            drawn.append(pipe(labels, here, seed=seed + start, **order).images.cpu())
    return (torch.cat(drawn) * 255).round().byte()


def write(x: Tensor, class_names: list[str], folder: Path) -> None:
    """PNG files in a folder for each class, which took turns."""
    names = class_names or ["all"]
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(x):
        to_pil_image(picture).save(folder / names[i % len(names)] / f"{i:05d}.png")


def print_table(rows: list[dict], args) -> None:
    """Means over the seeds and their deviation."""
    print(f"{'variant':30} {'CPU-s':>6} {'guidance':>9} {'fid[own]':>18} {'kid[own]':>20}   n = {args.n}")
    keys = dict.fromkeys((row["variant"], row["cpu_seconds"], row["guidance"]) for row in rows)
    for name, seconds, guidance in keys:
        same = [r for r in rows if (r["variant"], r["cpu_seconds"], r["guidance"]) == (name, seconds, guidance)]
        cells = [
            f"{statistics.mean(values):.4g} ± {statistics.stdev(values) if len(values) > 1 else 0:.2g}"
            for values in ([row[figure] for row in same] for figure in ("fid[own]", "kid[own]"))
        ]
        print(f"{name:30} {seconds:>6.0f} {guidance:>9} {cells[0]:>18} {cells[1]:>20}")


if __name__ == "__main__":
    sys.exit(main())
