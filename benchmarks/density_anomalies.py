"""Parts `digits`, `left-out` and `simple` of `benchmarks.density`: does a detector find what does not belong?"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.figures import Figure
from calotype.autoencoder import load_autoencoder, posterior
from calotype.data import Pictures, evenly_spaced
from calotype.density.calibration import Typicality
from calotype.density.detector import Detector
from calotype.density.examples import dequantize
from calotype.density.flows import bits_per_dim, load_flow, log_normal
from calotype.density.ranking import Estimate, roc_auc
from calotype.density.scores import complexity
from calotype.images import load_image, normalize
from calotype.randomness import uniform
from calotype.sheet import read_sheet

_NORMAL, _OTHERS = 1000, 250  # test pictures of a normal digit, and of each other one
_LEFT_OUT = 1000  # training pictures of each of nine digits
_BY_DIFFUSION = 250  # test pictures of either kind that the diffusion likelihood is found of
_DIFFUSION_STEPS = 600
_CIFAR, _SIMPLE = 10_000, 1000  # training pictures, and test pictures of each kind
_PIXEL_STEPS = 600
Scores = dict[str, torch.Tensor]


# Commands


def quietly(log: Path, argv: list[str]) -> None:
    """Run a command in a process of its own on one thread, with what it says in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        command = [sys.executable, "-m", "calotype", *argv]
        done = subprocess.run(command, stdout=stream, stderr=stream, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"calotype {' '.join(argv)} ended with {done.returncode}; see {log}")


def fitted(args: argparse.Namespace, name: str, source: Path, *words: str) -> Path:
    """The run of a detector of these normal pictures."""
    run = args.out / name
    size = () if "--image-size" in words else ("--image-size", "28")
    quietly(args.out / f"{name}.txt", ["anomaly", "fit", str(source), *size, *words, "--out", str(run)])
    return run


def linked(folder: Path, files: list[Path], root: Path) -> Path:
    """A folder that holds these files of `root`, in their sub-folders."""
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        for file in files:
            there = temporary / file.relative_to(root)
            there.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, there)
            except OSError:  # another disk
                shutil.copyfile(file, there)
        temporary.rename(folder)
    return folder


def each(args: argparse.Namespace, run: Callable[[argparse.Namespace, int], dict]) -> list[dict]:
    """What `run` finds for each digit, several at a time, in processes of one thread."""
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(partial(run, args), range(args.runs)))


def some(folder: Path, count: int) -> list[Image.Image]:
    """Pictures of a folder, evenly spread over it."""
    files = sorted(folder.iterdir())
    return [load_image(files[i], channels=3) for i in evenly_spaced(len(files), count)]


def scored(detector: Detector, images: list[Image.Image]) -> Scores:
    """The scores (n,) of pictures, and their p of the combination."""
    parts = []
    for start in range(0, len(images), 250):
        found = detector.examine(torch.cat([detector.prepare(image) for image in images[start : start + 250]]))
        parts.append(found.scores | {"p": found.p["combination"]})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def auc(normal: torch.Tensor, anomalous: torch.Tensor) -> Estimate:
    """ROC-AUC with its 95 % interval."""
    labels = torch.cat([torch.zeros(len(normal)), torch.ones(len(anomalous))]).bool()
    return roc_auc(torch.cat([normal, anomalous]).double(), labels)


# MNIST


def digits(args: argparse.Namespace) -> list[Figure]:
    """One digit is normal."""
    found = each(args, _one_normal)
    return [*of_scores("one normal", found), *alarms(found)]


def _one_normal(args: argparse.Namespace, k: int) -> dict:
    run = fitted(args, f"digit-{k}", args.mnist / "train" / str(k))
    found = judged(args, run, [k], [j for j in range(10) if j != k])
    return found | {"diffusion alone": by_diffusion(args, run, k)}


def left_out(args: argparse.Namespace) -> list[Figure]:
    """One digit is not normal."""
    return of_scores("one left out", each(args, _one_left_out), goals=False)


def _one_left_out(args: argparse.Namespace, k: int) -> dict:
    root, rest = args.mnist / "train", [j for j in range(10) if j != k]
    files = [file for j in rest for file in sorted((root / str(j)).iterdir())[:_LEFT_OUT]]
    source = linked(args.out / f"without-{k}-pictures", files, root)
    return judged(args, fitted(args, f"without-{k}", source), rest, [k])


def judged(args: argparse.Namespace, run: Path, normal: list[int], others: list[int]) -> dict:
    """ROC-AUC by score, and the share of normal test pictures that raise the alarm at 5 %."""
    detector = Detector.open(run)
    few, many = _NORMAL // len(normal), _OTHERS if len(others) > 1 else _NORMAL
    usual, strange = (
        scored(detector, [image for k in kind for image in some(args.mnist / "test" / str(k), count)])
        for kind, count in ((normal, few), (others, many))
    )
    found: dict = {name: auc(usual[name], strange[name]) for name in usual if name != "p"}
    found["alarms"] = (usual["p"] <= 0.05).double().mean().item()
    found["checked"] = next(one["share"] for one in detector.facts.false_alarms if one["rate"] == 0.05)
    return found


def by_diffusion(args: argparse.Namespace, run: Path, k: int) -> Estimate:
    """ROC-AUC of -log p of the code by the ODE of a diffusion model, of 500 test pictures."""
    from calotype.density.diffusion import log_prob
    from calotype.pipeline.model_folder import load

    words = ["--latents", str(run / "latents"), "--steps", str(_DIFFUSION_STEPS), "--validations", "1"]
    log = args.out / f"{run.name}.txt"
    if not (run / "pipeline" / "model_index.json").is_file():
        quietly(log, ["train-diffusion", *words, "--out", str(run / "stage2_diffusion")])
        quietly(log, ["export", "--run", str(run)])
    detector, pipe = Detector.open(run), load(run / "pipeline")
    vae = load_autoencoder(run / "stage1_vae" / "vae", "--vae")
    found = []
    others = [
        image for j in range(10) if j != k for image in some(args.mnist / "test" / str(j), _BY_DIFFUSION // 9 + 1)
    ]
    for images in (some(args.mnist / "test" / str(k), _BY_DIFFUSION), others[:_BY_DIFFUSION]):
        x = torch.cat([detector.prepare(image) for image in images])
        with torch.no_grad():
            found.append(-log_prob(pipe, posterior(vae, x)["mean"]))
    return auc(*found)


def of_scores(what: str, found: list[dict], goals: bool = True) -> list[Figure]:
    """The mean ROC-AUC of each score over the runs, its range, and how far the combination is from the best."""
    names = [name for name in found[0] if isinstance(found[0][name], Estimate)]
    means = {name: statistics.mean(one[name].value for one in found) for name in names}
    rows = []
    for name in names:
        values = [one[name].value for one in found]
        half = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        inner = statistics.mean((one[name].high - one[name].low) / 2 for one in found)
        goal = 0.9 if goals and name == "combination" else None
        how = f"mean of {len(found)} runs ± {half:.3f}; 95 % interval of one ± {inner:.3f}; least {min(values):.3f}"
        rows.append(Figure(f"{what}: {name}", means[name], "AUC", goal, low=min(values), high=max(values), how=how))
    best = max((name for name in names if name != "combination"), key=means.__getitem__)
    lead = means["combination"] - means[best]
    rows.append(Figure(f"{what}: combination - best", lead, "AUC", -0.01 if goals else None, how=f"best: {best}"))
    return rows


def alarms(found: list[dict]) -> list[Figure]:
    """The share of false alarms at 5 %: of held-out pictures that calibrated nothing, and of the test pictures."""
    rows = []
    for name, what in (("checked", "held-out pictures"), ("alarms", "test pictures, by other writers")):
        values = [one[name] for one in found]
        mean, worst = statistics.mean(values), max(abs(v - 0.05) for v in values)
        how = f"{what}, {len(values)} runs from {min(values):.1%} to {max(values):.1%}, worst off by {worst:.1%}"
        rows.append(Figure(f"false alarms at 5 %, off by: {name}", 100 * abs(mean - 0.05), "%", 1.5, True, how=how))
    return rows


# CIFAR-10


def simple(args: argparse.Namespace) -> list[Figure]:
    """Photographs are normal; digits, noise and flat grey are not."""
    root = args.cifar10 / "train"
    classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    files = [f for name in classes for f in sorted((root / name).iterdir())[: _CIFAR // len(classes)]]
    source = linked(args.out / "photographs-pictures", files, root)
    run = fitted(args, "photographs", source, "--image-size", "32")
    detector = Detector.open(run)
    kinds = strangers(args, classes)
    usual = scored(detector, kinds.pop("photographs"))
    rows = []
    for kind, images in kinds.items():
        strange = scored(detector, images)
        for name in (name for name in usual if name != "p"):
            found = auc(usual[name], strange[name])
            goal = 0.99 if name == "typicality" else None
            rows.append(Figure(f"photographs against {kind}: {name}", found.value, "AUC", goal,
                               low=found.low, high=found.high, how=f"{len(images)} each"))  # fmt: skip
    return rows + in_pixels(args, run, detector, strangers(args, classes))


def strangers(args: argparse.Namespace, classes: list[str]) -> dict[str, list[Image.Image]]:
    """Test pictures by kind."""
    photographs = [i for name in classes for i in some(args.cifar10 / "test" / name, _SIMPLE // len(classes))]
    digits = [i for k in range(10) for i in some(args.mnist / "test" / str(k), _SIMPLE // 10)]
    noise = (256 * uniform(0, "noise", 0, _SIMPLE, (32, 32, 3))).byte().numpy()
    grey = (256 * uniform(0, "grey", 0, _SIMPLE)).byte().numpy()
    return {
        "photographs": photographs,
        "digits": digits,
        "noise": [Image.fromarray(one) for one in noise],
        "flat grey": [Image.fromarray(np.full((32, 32, 3), level, np.uint8)) for level in grey],
    }


def in_pixels(args, run: Path, detector: Detector, kinds: dict[str, list[Image.Image]]) -> list[Figure]:
    """The same with a flow of the pictures themselves: its likelihood as it is, and how typical that is."""
    network = "--kind glow --width 64 --depth 6 --batch-size 64 --condition none --validations 2".split()
    words = ["--pixels", str(run / "data.json"), *network, "--steps", str(_PIXEL_STEPS)]
    quietly(args.out / "photographs.txt", ["train-flow", *words, "--out", str(run / "pixels")])
    flow = load_flow(run / "pixels" / "prior", "--flow")
    pictures = Pictures(read_sheet(run / "data.json"), "val")
    held_out = normalize(torch.stack([pictures[i] for i in evenly_spaced(len(pictures), _SIMPLE)]))
    x = {kind: torch.cat([detector.prepare(image) for image in images]) for kind, images in kinds.items()}
    normal, found = _of_pixels(flow, held_out), {kind: _of_pixels(flow, part) for kind, part in x.items()}
    usual = found.pop("photographs")
    return [row for kind, values in found.items() for row in _rows_in_pixels(kind, normal, usual, values)]


def _rows_in_pixels(kind: str, normal: Scores, usual: Scores, strange: Scores) -> list[Figure]:
    """Likelihood, and typicality as far as the flow itself goes and with what PNG needs, as a detector has it."""
    raw, typical = auc(usual["bits"], strange["bits"]), f"pixels against {kind}: typicality"
    bits = f"{strange['bits'].mean():.2f} bits/dim against {usual['bits'].mean():.2f}"
    rows = [Figure(f"pixels against {kind}: likelihood", raw.value, "AUC", low=raw.low, high=raw.high, how=bits)]
    for names, goal, how in ((["bits", "norm"], None, "by the flow alone"), (list(usual), 0.99, "and what PNG needs")):
        measure = Typicality({name: normal[name] for name in names})
        found = auc(*(measure({name: values[name] for name in names}) for values in (usual, strange)))
        rows.append(Figure(typical, found.value, "AUC", goal, low=found.low, high=found.high, how=how))
    return rows


@torch.no_grad()
def _of_pixels(flow, x: torch.Tensor) -> Scores:
    """Bits per dimension of 8-bit pictures, the norm of their noise, and what PNG needs beside these bits (n,)."""
    found = []
    for part in ((x + 1) * 127.5).round().byte().split(100):
        eps, ladj = flow(dequantize(part, torch.tensor(0.5)))
        size = part[0].numel()
        found.append(torch.stack([bits_per_dim(log_normal(eps) + ladj, size) + 7, eps.flatten(1).norm(dim=1)]))
    bits, norm = torch.cat(found, dim=1).double()
    needed = complexity(x).double()
    return {"bits": bits, "norm": norm, "complexity": needed, "bits less complexity": bits - needed}
