"""Few steps: is the student of `calotype distill` as good as its teacher, and the tiny decoder as the full one?

    calotype distill RUN
    python -m benchmarks.fewstep --run RUN

Samples of the same seeds and labels are drawn by the teacher as the model is exported, and by the student in 1, 2 and 4
evaluations, decoded in full or by the tiny decoder. They are compared with all held-out pictures in the features of a
small network trained on the run's own pictures, and in those of fixed filters. Decoders are timed on one thread, CPU
time, taking turns. Exit code 1 if a goal is missed; the last line is the result as JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calotype import device
from calotype.autoencoder import crop
from calotype.data import Pictures, evenly_spaced
from calotype.features import FeatureNetwork, gradients
from calotype.images import normalize
from calotype.latents import LatentCache
from calotype.metrics import frechet_distance, kernel_interval, moments, psnr
from calotype.own_features import own
from calotype.pipeline.export import assemble
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.references import reference
from calotype.sheet import read_sheet

GOALS = {"ratio": 1.25, "gap": 1.5, "times as fast": 5.0}
STEPS = (1, 2, 4)
_BATCH = 64


class Way(NamedTuple):
    """How samples are drawn."""

    name: str
    steps: int
    guidance: float
    evaluations: int  # of the network, for one picture
    arguments: dict[str, Any]


def main() -> int:
    """Draw, compare, time; print the tables and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run with its distilled/")
    parser.add_argument("-n", type=int, default=2000, help="samples of each way")
    parser.add_argument("--seed", type=int, default=1000, help="of the first sample")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=20, help="of timing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = assemble(args.run).to(device.device())
    for part in (pipe.unet, pipe.student, pipe.vae):
        device.for_drawing(part)
    pipe.tiny_decoder.to(memory_format=torch.channels_last)  # no file can hold this; the full one gains nothing by it
    pipe.set_progress_bar_config(disable=True)
    found = {"samples": compare(args, pipe), "decoder": decoders(args, pipe)}
    missed = [name for name, value in goals(found).items() if not value]
    print(f"Missed: {', '.join(missed)}." if missed else "Every goal is met.")
    print(json.dumps({"run": str(args.run), "n": args.n, "seed": args.seed} | found | {"missed": missed}))
    return int(bool(missed))


def goals(found: dict[str, Any]) -> dict[str, bool]:
    """Whether each goal is met."""
    four = next(row for row in found["samples"] if row["way"] == "student, 4 steps")
    decoder = found["decoder"]
    return {
        "distance in 4 steps": four["ratio[own]"] <= GOALS["ratio"],
        "decoder gap": decoder["gap"] <= GOALS["gap"],
        "decoder speed": decoder["times as fast"] >= GOALS["times as fast"],
    }


# Samples


def ways(pipe: LatentDiffusionPipeline) -> list[Way]:
    """The teacher's default, the student in few steps, and the student with the tiny decoder."""
    guidance, each = pipe.default_guidance, 1 if pipe.default_guidance == 1 else 2
    found = [Way("teacher, default", pipe.default_steps, guidance, each * pipe.default_steps, {})]
    for steps in STEPS:
        fast = {"fast": True, "num_inference_steps": steps}
        found.append(Way(f"student, {steps} steps", steps, guidance, steps, fast | {"decoder": "full"}))
    return [*found, Way("student, 4 steps, tiny decoder", 4, guidance, 4, fast | {"decoder": "tiny"})]


def compare(args: argparse.Namespace, pipe: LatentDiffusionPipeline) -> list[dict[str, Any]]:
    """Distances of every way's samples, and their ratios to the teacher's."""
    sheet, folder = read_sheet(args.run / "data.json"), args.run / "evaluation"
    held_out = Pictures(sheet, "val")
    networks = [own(sheet, folder / "own", args.precision).network, gradients()]
    real = {network.name: reference(folder, "val", held_out, network) for network in networks}
    rows: list[dict[str, Any]] = []
    print(
        f"{'way':32} {'evaluations':>11} {'s/picture':>9}" + "".join(f" {f'FD[{n.name}]':>15} ratio" for n in networks)
    )
    for way in ways(pipe):
        began = time.process_time()
        x = drawn(pipe, way, args)
        seconds = (time.process_time() - began) / args.n
        row = {"way": way.name, "evaluations": way.evaluations, "guidance": way.guidance, "cpu_s": seconds}
        for network in networks:
            row |= distances(network, real[network.name], x, rows[0] if rows else None)
        rows.append(row)
        line = "".join(f" {row[f'fd[{n.name}]']:15.4g} {row[f'ratio[{n.name}]']:5.2f}" for n in networks)
        print(f"{way.name:32} {way.evaluations:11} {seconds:9.4f}{line}", flush=True)
    return rows


@torch.no_grad()
def drawn(pipe: LatentDiffusionPipeline, way: Way, args: argparse.Namespace) -> Tensor:
    """Pictures (n, C, H, W) in [-1, 1]; classes take turns, or prompts where the model reads such."""
    names = pipe.labels or json.loads((args.run / "stage2_diffusion" / "model.json").read_text()).get("prompts")
    parts = []
    for start in range(0, args.n, _BATCH):
        count = min(_BATCH, args.n - start)
        labels = [names[(start + i) % len(names)] for i in range(count)] if names else None
        with device.autocast(args.precision):
            order = {"seed": args.seed + start, "output_type": "pt"} | way.arguments
            parts.append(pipe(labels, count, **order).images.float().cpu())
    return torch.cat(parts) * 2 - 1


def distances(network: FeatureNetwork, real: Tensor, x: Tensor, teacher: dict[str, Any] | None) -> dict[str, float]:
    """Fréchet and kernel distance of pictures (n, C, H, W) in [-1, 1], and the ratio to the teacher's."""
    name = network.name
    made = network.of(((part / 2 + 0.5).mul(255).round().byte() for part in x.split(_BATCH)), device.device())
    distance, kernel = frechet_distance(moments(real), moments(made)), kernel_interval(real, made)
    ratio = distance / teacher[f"fd[{name}]"] if teacher else 1.0
    return {f"fd[{name}]": distance, f"kd[{name}]": kernel.value, f"ratio[{name}]": ratio}


# Decoders


@torch.no_grad()
def decoders(args: argparse.Namespace, pipe: LatentDiffusionPipeline) -> dict[str, Any]:
    """How far the tiny decoder is behind in dB on held-out pictures, and how much faster it is."""
    found = quality(args, pipe)
    z = torch.randn(_BATCH, *pipe.latent_shape, generator=torch.Generator().manual_seed(0)).to(device.device())
    for precision in ("fp32", "bf16"):
        with device.autocast(precision):
            ratio, tiny = speed(lambda: pipe.vae.decode(z), lambda: pipe.tiny_decoder.decode(z), args.rounds)
        found |= {f"ratio[{precision}]": ratio, f"ms[{precision}]": 1000 * tiny / _BATCH}
    found["times as fast"] = found[
        f"ratio[{'bf16' if device.resolve_precision(args.precision).itemsize == 2 else 'fp32'}]"
    ]
    print(
        f"Decoder: full {found['full']:.2f} dB, tiny {found['tiny']:.2f} dB, gap {found['gap']:.2f} dB "
        f"(n = {found['n']:,}); {found['ratio[fp32]']:.1f} times as fast in fp32, {found['ratio[bf16]']:.1f} in bf16."
    )
    return found


def quality(args: argparse.Namespace, pipe: LatentDiffusionPipeline) -> dict[str, float]:
    """PSNR of held-out pictures from their posteriors' means, in dB."""
    pictures, cache = Pictures(read_sheet(args.run / "data.json"), "val"), LatentCache(args.run / "latents", "val")
    items = evenly_spaced(len(cache), args.n)
    values: dict[str, list[Tensor]] = {"full": [], "tiny": []}
    for start in range(0, len(items), _BATCH):
        here = torch.tensor(items[start : start + _BATCH]).numpy()
        z = cache.gather(here, "mean").to(device.device())
        x = normalize(torch.stack([pictures[int(i)] for i in here]))
        for name, decoder in (("full", pipe.vae), ("tiny", pipe.tiny_decoder)):
            with device.autocast(args.precision):
                x_hat = crop(decoder.decode(z).sample.float(), tuple(x.shape[2:])).clamp(-1, 1).cpu()
            values[name].append(psnr(x_hat, x))
    full, tiny = (torch.cat(values[name]).mean().item() for name in ("full", "tiny"))
    return {"full": full, "tiny": tiny, "gap": full - tiny, "n": len(items)}


def speed(full: Callable[[], Any], tiny: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """The median ratio of CPU seconds over rounds in which both take turns, and the tiny one's median."""
    ratios, seconds = [], []
    for _ in range(rounds + 2):  # two to warm up
        spent = []
        for decode in (full, tiny):
            began = time.process_time()
            decode()
            spent.append(time.process_time() - began)
        ratios.append(spent[0] / spent[1])
        seconds.append(spent[1])
    return torch.tensor(ratios[2:]).median().item(), torch.tensor(seconds[2:]).median().item()


if __name__ == "__main__":
    sys.exit(main())
