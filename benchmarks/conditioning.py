"""Do models do what they are told? Captions, holes to fill and small pictures to enlarge, on the embedded shapes.

    python -m benchmarks.conditioning --out DIR --minutes 12

What DIR does not hold yet is trained: `calotype run shapes:full --condition …`, with one autoencoder for all. The last
line is the result as JSON; the exit code is 1 if a goal is missed.

text, plain: of 480 captions of pictures that were never seen (of shapes:full, and of shapes), how many samples show the
shape and the colour asked for, by the network of `benchmarks.shapes_quality`; of the first also how many stand in the
asked-for ninth of the picture, by the centroid of what differs from the background, against captions dealt out anew.
inpaint: the mean step between neighbouring pixels on both sides of the hole's edge: in true pictures, with the hole
filled from another picture, with the model's filling; and how far what was filled is from the true picture.
superres: PSNR, and the Fréchet distance in the features of a network trained on the run's own pictures, against
bicubic enlargement.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes_quality import classify, held_out_scores, make_judge, score
from calotype import cli, device, own_features
from calotype.data import Pictures, evenly_spaced
from calotype.images import image_grid, normalize, to_uint8
from calotype.metrics import frechet_distance, moments, psnr
from calotype.pipeline.generate import load
from calotype.pipeline.pictures import degrade, shrink
from calotype.randomness import numpy_generator
from calotype.shapes import FULL, PLAIN, Factors, Variation, draw_factors, render
from calotype.sheet import read_sheet
from calotype.stage2_diffusion.masks import random_masks

CAPTIONS, CAPTION_SEED = 480, 3_000_001
PICTURES = 256
_BACKGROUND = 0.25  # a pixel this far from the corners' colour, of the range of 2, belongs to the shape
_MIDDLE = 0.07  # as calotype.shapes has it
FACTOR = 4


def main() -> int:
    """Train what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=12, help="of the run with captions; the others take 0.6 of it")
    measures = {"text": text, "plain": plain_text, "inpaint": inpaint, "superres": superres}
    parser.add_argument("--only", nargs="+", choices=measures, default=list(measures))
    args = parser.parse_args()
    rows = [row for name in args.only for row in measures[name](run_of(args, name))]
    print(f"{'figure':64} {'found':>9} {'goal':>10} {'n':>6}")
    for row in rows:
        goal = f"{row['sign']} {row['goal']:.4g}" if "goal" in row else ""
        print(f"{row['figure']:64} {row['found']:>9.4g} {goal:>10} {row['n']:>6}")
    print(json.dumps(rows))
    return int(any(not met(row) for row in rows))


def met(row: dict) -> bool:
    if "goal" not in row:
        return True
    return row["found"] >= row["goal"] if row["sign"] == ">=" else row["found"] <= row["goal"]


def run_of(args, name: str) -> Path:
    """The run of a condition, trained unless it is there."""
    out = args.out / name
    condition = {"superres": f"superres:{FACTOR}", "plain": "text"}.get(name, name)
    words = ["run", "shapes" if name == "plain" else "shapes:full", "--condition", condition, "--out", str(out)]
    vae = args.out / "text/stage1_vae/vae"
    if name not in ("text", "plain") and vae.is_dir():
        words += ["--vae", str(vae), "--max-minutes", f"{0.6 * args.minutes}"]
    else:
        words += ["--max-minutes", f"{args.minutes}"]
    if not (out / "report.html").is_file() and cli.main(words):
        sys.exit(f"calotype {' '.join(words)} failed")
    return out


def draw(run: Path, label, count: int, **more) -> Tensor:
    """Pictures (count, C, H, W) in [-1, 1] at the model's default steps and guidance, seeds from 1000 on."""
    pipe, drawn = load(run), []
    for start in range(0, count, 64):
        part = slice(start, min(start + 64, count))
        each = {name: values[part] for name, values in more.items()}
        with device.autocast("auto"):
            labels = label[part] if label is not None else None
            x = pipe(labels, part.stop - start, seed=1000 + start, output_type="pt", **each).images
        drawn.append(x.float().cpu() * 2 - 1)
    return torch.cat(drawn)


# Captions


def plain_text(run: Path) -> list[dict]:
    """Shape and colour alone: in plain `shapes` everything is in the middle."""
    return shape_and_colour(run, "plain", *samples(run, PLAIN))


def text(run: Path) -> list[dict]:
    """Shape, colour and place of samples for captions."""
    x, wanted = samples(run, FULL)
    true = torch.stack([normalize(to_uint8(render(f, tuple(x.shape[2:])))) for f in wanted])
    asked = torch.tensor([cell(torch.tensor([f.x, f.y])) for f in wanted])
    shuffled = asked[torch.from_numpy(numpy_generator(0, "captions dealt out").permutation(CAPTIONS))]
    there, chance = (cells(x) == asked).double().mean().item(), (cells(x) == shuffled).double().mean().item()
    by_eye = (cells(true) == asked).double().mean().item()
    return shape_and_colour(run, "full", x, wanted) + [
        {"figure": "text: place right", "found": there, "goal": 3 * chance, "sign": ">=", "n": CAPTIONS},
        {"figure": "text: place right by chance", "found": chance, "n": CAPTIONS},
        {"figure": "text: place right, of true pictures", "found": by_eye, "n": CAPTIONS},
    ]


def samples(run: Path, variation: Variation) -> tuple[Tensor, list[Factors]]:
    """Samples (480, C, H, W) in [-1, 1] for captions, and what these ask for."""
    wanted = [draw_factors(CAPTION_SEED, i, variation) for i in range(CAPTIONS)]
    x = draw(run, [f.caption for f in wanted], CAPTIONS)
    sheet(x[:48], run / "captions.png", columns=12)
    return x, wanted


def shape_and_colour(run: Path, variation: str, x: Tensor, wanted: list[Factors]) -> list[dict]:
    judge = make_judge(run / "judge.safetensors", variation, 10)
    print("the judge on true pictures:", held_out_scores(judge, variation))
    right = score(classify(judge, x), torch.tensor([f.label for f in wanted]))
    name = "text" if variation == "full" else "plain text"
    return [
        {
            "figure": f"{name}: shape and colour right",
            "found": right["both"],
            "goal": 0.85,
            "sign": ">=",
            "n": CAPTIONS,
        },
        {"figure": f"{name}: shape right", "found": right["shape"], "n": CAPTIONS},
        {"figure": f"{name}: colour right", "found": right["colour"], "n": CAPTIONS},
    ]


def cells(x: Tensor) -> Tensor:
    """In which ninth (B,) the shape of each picture (B, C, H, W) stands."""
    corners = torch.stack([x[:, :, i, j] for i in (0, -1) for j in (0, -1)]).median(0).values
    shape = ((x - corners[:, :, None, None]).abs().amax(1) > _BACKGROUND).double()
    height, width = x.shape[2:]
    total = shape.sum((1, 2)).clamp_min(1)
    across = (shape.sum(1) @ ((torch.arange(width) + 0.5) / width).double()) / total
    down = (shape.sum(2) @ ((torch.arange(height) + 0.5) / height).double()) / total
    return torch.tensor([cell(place) for place in torch.stack([across, down], 1)])


def cell(place: Tensor) -> int:
    """0 to 8 for a place (x, y) in [0, 1]."""
    column, row = (0 if abs(v - 0.5) <= _MIDDLE else -1 if v < 0.5 else 1 for v in place.tolist())
    return 3 * (row + 1) + column + 1


# Pictures


def held_out(run: Path) -> tuple[Tensor, list[int]]:
    """True pictures (n, C, H, W) in [-1, 1] that no stage has seen, and their classes."""
    pictures = Pictures(read_sheet(run / "data.json"), "val")
    items = evenly_spaced(len(pictures), PICTURES)
    return normalize(torch.stack([pictures[i] for i in items])), pictures.labels[items].tolist()


def inpaint(run: Path) -> list[dict]:
    """Steps across the edge of the hole."""
    x, labels = held_out(run)
    size = tuple(x.shape[2:])
    masks = random_masks(7, "benchmark", 0, 4 * len(x), size)
    masks = masks[[i for i, m in enumerate(masks) if m.mean() < 0.9][: len(x)]]
    filled = draw(run, labels, len(x), image=pil(x), mask=pil(2 * masks - 1))
    pasted = torch.where(masks > 0.5, x.roll(1, 0), x)
    sheet(torch.cat([x * (1 - masks), filled, x])[rows_of(len(x), 12, 3)], run / "filled.png", columns=12)
    seams = {name: seam(y, masks) for name, y in (("true", x), ("pasted", pasted), ("filled", filled))}
    excess = (seams["filled"] - seams["true"]) / (seams["pasted"] - seams["true"])
    hole = masks.expand_as(x) > 0.5
    error = {name: (y - x)[hole].abs().mean().item() for name, y in (("pasted", pasted), ("filled", filled))}
    n = len(x)
    return [
        {"figure": "inpaint: step across the edge, true pictures", "found": seams["true"], "n": n},
        {"figure": "inpaint: step across the edge, from another picture", "found": seams["pasted"], "n": n},
        {"figure": "inpaint: step across the edge, filled by the model", "found": seams["filled"], "n": n},
        {
            "figure": "inpaint: excess over true, share of the pasted",
            "found": excess,
            "goal": 0.5,
            "sign": "<=",
            "n": n,
        },
        {"figure": "inpaint: error in the hole, from another picture", "found": error["pasted"], "n": n},
        {"figure": "inpaint: error in the hole, model", "found": error["filled"], "goal": error["pasted"], "n": n}
        | {"sign": "<="},
    ]


def seam(x: Tensor, mask: Tensor) -> float:
    """Mean step between neighbours of which one is in the hole and one is not."""
    steps = []
    for dim in (2, 3):
        first, second = (slice(None, -1), slice(1, None))
        here = (slice(None),) * dim
        edge = (mask[(*here, first)] != mask[(*here, second)]).expand(-1, x.shape[1], -1, -1)
        steps.append((x[(*here, first)] - x[(*here, second)]).abs()[edge])
    return torch.cat(steps).mean().item()


def superres(run: Path) -> list[dict]:
    """Against bicubic enlargement of the same small pictures."""
    x, labels = held_out(run)
    small = shrink(x, FACTOR)
    bicubic = degrade(f"superres:{FACTOR}", x)
    enlarged = draw(run, labels, len(x), image=pil(small))
    shown = torch.cat([F.interpolate(small, x.shape[2:]), bicubic, enlarged, x])
    sheet(shown[rows_of(len(x), 12, 4)], run / "enlarged.png", columns=12)
    network = own_features.own(read_sheet(run / "data.json"), run / "evaluation/own", "auto").network
    true = moments(network.features(x).float().cpu())
    distance = {
        name: frechet_distance(moments(network.features(y).float().cpu()), true)
        for name, y in (("bicubic", bicubic), ("model", enlarged))
    }
    decibels = {name: psnr(y, x).mean().item() for name, y in (("bicubic", bicubic), ("model", enlarged))}
    n = len(x)
    return [
        {"figure": "superres: PSNR, bicubic", "found": decibels["bicubic"], "n": n},
        {
            "figure": "superres: PSNR, model",
            "found": decibels["model"],
            "goal": decibels["bicubic"],
            "sign": ">=",
            "n": n,
        },
        {"figure": "superres: fid[own], bicubic", "found": distance["bicubic"], "n": n},
        {"figure": "superres: fid[own], model", "found": distance["model"], "goal": distance["bicubic"], "n": n}
        | {"sign": "<="},
    ]


def rows_of(count: int, columns: int, kinds: int) -> list[int]:
    """Of `kinds` sets of `count` pictures the first rows, one kind below the other, twice."""
    return [kind * count + row * columns + i for row in range(2) for kind in range(kinds) for i in range(columns)]


def pil(x: Tensor) -> list:
    from torchvision.transforms.v2.functional import to_pil_image

    return [to_pil_image(((picture + 1) * 127.5).round().byte()) for picture in x.clamp(-1, 1)]


def sheet(x: Tensor, file: Path, columns: int) -> None:
    image_grid(((x.clamp(-1, 1) + 1) * 127.5).round().byte(), columns).save(file)


if __name__ == "__main__":
    sys.exit(main())
