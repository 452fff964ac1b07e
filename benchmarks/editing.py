"""What a trained model does to pictures: inversion, repainting by blending, the way between two seeds.

    python -m benchmarks.editing --run RUN --out DIR

RUN is a finished run of a model that is not given pictures. Sheets go to DIR; the last line is the result as JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.conditioning import PICTURES, held_out, pil, rows_of, seam, sheet
from calotype import device, own_features
from calotype.metrics import frechet_distance, kernel_distance, moments, psnr
from calotype.pipeline import latent_space
from calotype.pipeline.generate import load
from calotype.pipeline.pictures import to_tensor
from calotype.sheet import read_sheet
from calotype.stage2_diffusion.masks import random_masks

FILMS, FRAMES = 32, 9


def main() -> int:
    """Print a table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the sheets")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = load(args.run)
    rows = []
    # The network that judges is trained before, in its own precision: under autocast it learns next to nothing.
    own_features.own(read_sheet(args.run / "data.json"), args.run / "evaluation/own", "auto")
    with device.autocast("auto"):
        for part in (inversion, repainting, ways):
            for row in part(pipe, args.run, args.out):
                rows.append(row)
                goal = f"{row['sign']} {row['goal']:.4g}" if "goal" in row else ""
                print(f"{row['figure']:60} {row['found']:>9.4g}  {goal:>9}  n = {row['n']}", flush=True)
    print(json.dumps(rows))
    return 0


def inversion(pipe, run: Path, out: Path) -> list[dict]:
    """Pictures to noise and back, told their labels."""
    x, labels = held_out(run)
    x, labels = x[:64], labels[:64]
    told = [pipe.labels[y] if pipe.labels and y >= 0 else None for y in labels]
    images = pil(x)
    noise = latent_space.invert(pipe, images, told)
    back = to_tensor(pipe.decode_latents(latent_space.develop(pipe, noise, told), "pil"))
    passed = to_tensor(pipe.reconstruct(images))
    sheet(torch.cat([x, back])[rows_of(len(x), 12, 2)], out / "inverted.png", columns=12)
    n = len(x)
    return [
        {"figure": "inversion: PSNR of the way there and back, dB", "found": mean(psnr(back, x)), "goal": 25, "n": n}
        | {"sign": ">="},
        {"figure": "inversion: of autoencoder alone, dB", "found": mean(psnr(passed, x)), "n": n},
        {"figure": "inversion: deviation of the noise", "found": noise.std().item(), "n": n},
    ]


def repainting(pipe, run: Path, out: Path) -> list[dict]:
    """Holes filled by a model that was never trained for it."""
    x, labels = held_out(run)
    masks = random_masks(7, "benchmark", 0, 4 * len(x), tuple(x.shape[2:]))
    masks = masks[[i for i, m in enumerate(masks) if m.mean() < 0.9][: len(x)]]
    told = [pipe.labels[y] if pipe.labels and y >= 0 else None for y in labels]
    pasted = torch.where(masks > 0.5, x.roll(1, 0), x)
    filled = to_tensor(pipe(told, len(x), image=pil(pasted), mask=pil(2 * masks - 1)).images)
    sheet(torch.cat([x * (1 - masks), filled, x])[rows_of(len(x), 12, 3)], out / "repainted.png", columns=12)
    steps = {name: seam(y, masks) for name, y in (("true", x), ("pasted", pasted), ("filled", filled))}
    excess = (steps["filled"] - steps["true"]) / (steps["pasted"] - steps["true"])
    rows = [
        {"figure": f"repainting: step across the edge, {name}", "found": v, "n": len(x)} for name, v in steps.items()
    ]
    last = {"figure": "repainting: excess over true, share of the pasted", "found": excess, "goal": 0.5, "sign": "<="}
    return [*rows, last | {"n": len(x)}]


def ways(pipe, run: Path, out: Path) -> list[dict]:
    """How evenly a film moves, and how true its middle looks, on the sphere and on the straight line."""
    network = own_features.own(read_sheet(run / "data.json"), run / "evaluation/own", "auto").network
    true = network.features(held_out(run)[0]).float().cpu()
    rows = []
    for name, mix in (("sphere", latent_space.slerp), ("straight line", torch.lerp)):
        films = torch.stack([film(pipe, 2 * i, 2 * i + 1, mix) for i in range(FILMS)])
        if name == "sphere":
            sheet(films[:12].flatten(0, 1), out / "ways.png", columns=FRAMES)
        step = (films[:, 1:] - films[:, :-1]).square().flatten(2).mean(2).sqrt()
        rows.append(
            {"figure": f"way on the {name}: largest step over the mean step", "n": FILMS}
            | {"found": mean(step.max(1).values / step.mean(1))}
        )
        middle = network.features(films[:, 2:-2].flatten(0, 1)).float().cpu()
        rows.append(
            {"figure": f"way on the {name}: fid[own] of the middle", "n": len(middle)}
            | {"found": frechet_distance(moments(middle), moments(true))}
        )
        rows.append(
            {"figure": f"way on the {name}: kid[own] of the middle", "n": len(middle)}
            | {"found": kernel_distance(middle, true)}
        )
    assert len(true) == PICTURES
    return rows


def film(pipe, a: int, b: int, mix) -> Tensor:
    """Frames (n, C, H, W) in [-1, 1] between two seeds with labels that change in turn."""
    ends = [latent_space.noise_of(pipe, seed) for seed in (a, b)]
    labels = [pipe.labels[seed % len(pipe.labels)] if pipe.labels else None for seed in (a, b)]
    shares = [i / (FRAMES - 1) for i in range(FRAMES)]
    told = [latent_space.blend(*labels, share) for share in shares]
    return to_tensor(pipe(told, FRAMES, latents=torch.cat([mix(*ends, share) for share in shares])).images)


def mean(values: Tensor) -> float:
    """As a number."""
    return values.mean().item()


if __name__ == "__main__":
    sys.exit(main())
