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

    def score(self, x: Tensor) -> dict[str, float]:
        """Fréchet distance of at most 1,000 uint8 pictures (n, C, H, W), for it falls with n, and kernel distance."""
        features = self.network.of(x.split(500), device.device())
        return {
            "fid[own]": frechet_distance(moments(features[:_COMPARED]), moments(self.reference)),
            "kid[own]": kernel_distance(features, self.reference),
        }


class Trial:
    """One variant with one seed."""

    def __init__(self, args, name: str, seed: int, judge: Judge):
        self.args, self.name, self.seed, self.judge = args, name, seed, judge
        latents, vae = args.run / "latents", args.run / "stage1_vae" / "vae"
        words = ["--latents", latents, "--vae", vae, "--out", "unused", "--seed", seed, "--steps", 1_000_000]
        words += [*VARIANTS[name], *args.more]
        self.settings = parse(DiffusionSettings, [str(word) for word in words], "objectives")
        self.stage = DiffusionStage(self.settings, vae, device.accelerator("auto"))

    def rows(self) -> list[dict]:
        """Train to the end of the time, with a look at the samples on the way."""
        found, spent, step = [], 0.0, 0
        batches, marks = self.stage.batches(0), [share * self.args.cpu_seconds for share in _CURVE]
        while spent < self.args.cpu_seconds:
            began = time.process_time()
            factor = learning_rate_factor(self.settings, step, min(spent / self.args.cpu_seconds, 1))
            for group in self.stage.optimizer.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            self.stage.step(next(batches), step)
            step, spent = step + 1, spent + time.process_time() - began
            if marks and spent >= marks[0]:
                found.append(self._row(marks.pop(0), step, 1.0, _CURVE_SAMPLES))
        end = self.args.cpu_seconds
        return found + [self._row(end, step, guidance, self.args.n) for guidance in self.args.guidance]

    def _row(self, seconds: float, step: int, guidance: float, count: int) -> dict:
        x = self._draw(guidance, count)
        folder = self.args.out / self.name.replace(" ", "_") / f"{self.seed}" / f"{seconds:.0f}s" / f"g{guidance}"
        self._write(x, folder)
        row = {"variant": self.name, "seed": self.seed, "cpu_seconds": seconds, "steps": step, "guidance": guidance}
        row |= {"n": count, "evaluations": self.args.steps, "samples": str(folder)} | self.judge.score(x)
        print(row, flush=True)
        return row

    @torch.no_grad()
    def _draw(self, guidance: float, count: int) -> Tensor:
        """Pictures uint8 (n, C, H, W), the classes in turn."""
        pipe, drawn = self.stage.pipeline(), []
        classes = len(self.stage.class_names)
        for start in range(0, count, 250):
            here = min(250, count - start)
            labels = [(start + i) % classes for i in range(here)] if classes else None
            with device.autocast("auto"):
                drawn.append(
                    pipe(
                        labels,
                        here,
                        seed=100_000 * (1 + self.seed) + start,
                        num_inference_steps=self.args.steps,
                        guidance_scale=guidance,
                        output_type="pt",
                    ).images
                )
        return (torch.cat(drawn) * 255).round().byte()

    def _write(self, x: Tensor, folder: Path) -> None:
        names = self.stage.class_names or ["all"]
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
