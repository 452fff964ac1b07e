"""Does the audit flag a model that was over-fitted on 64 pictures, and pass one that was trained on many?

    python -m benchmarks.memorization --run RUN [--out DIR]

The first model is trained here, on 64 pictures of `shapes:full`, for far too long; the second is a finished run on tens
of thousands of pictures. The last line is the result as JSON; the exit code is 1 if either verdict is wrong.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from calotype import cli
from calotype.shapes import FULL, draw_factors, render

PICTURES, HELD_OUT, SIDE = 64, 640, 16
COLUMNS = ("nearer", "chance", "copied", "p", "verdict")


def render_folder(folder: Path, numbers: range) -> Path:
    folder.mkdir(parents=True)
    for i in numbers:
        render(draw_factors(0, i, FULL), (SIDE, SIDE)).save(folder / f"{i:05d}.png")
    return folder


def overfit(out: Path, steps: int) -> Path:
    """A run on 64 pictures, with ten times as many held out; one that is finished in `out` is taken as it is."""
    if (out / "run/pipeline/model_index.json").is_file():
        return out / "run"
    train = render_folder(out / "train", range(PICTURES))
    val = render_folder(out / "val", range(PICTURES, PICTURES + HELD_OUT))
    run = out / "run"
    stage1 = ["--width", "16", "--factor", "2", "--steps", "500", "--batch-size", "32"]
    stage2 = ["--width", "48", "--steps", str(steps), "--batch-size", "64", "--lr", "2e-3", "--validations", "2"]
    for argv in (
        ["data", str(train), "--val", str(val), "--image-size", str(SIDE), "--out", str(run)],
        ["train-vae", str(run / "data.json"), *stage1, "--out", str(run / "stage1_vae")],
        ["encode", str(run / "data.json"), "--vae", str(run / "stage1_vae/vae"), "--out", str(run / "latents")],
        ["train-diffusion", "--latents", str(run / "latents"), *stage2, "--out", str(run / "stage2_diffusion")],
        ["export", "--run", str(run)],
    ):
        if cli.main(argv):
            sys.exit(f"failed: {' '.join(argv)}")
    return run


def audited(run: Path, n: int) -> dict:
    argv = ["evaluate", str(run), "--features", "gradients", "--audit", "-n", str(n)]
    if cli.main(argv):
        sys.exit(f"failed: {' '.join(argv)}")
    return json.loads((run / "evaluation/memorisation.json").read_text())


def table(found: dict[str, dict]) -> Table:
    rows = Table("model", *COLUMNS, box=None)
    for name, entry in found.items():
        rows.add_row(name, *(f"{entry[c]:.3g}" if isinstance(entry[c], float) else entry[c] for c in COLUMNS))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run on many pictures, which must pass")
    parser.add_argument("--out", type=Path, help="folder of the over-fitted run (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=3000, help="of the over-fitted model's second stage")
    parser.add_argument("-n", type=int, default=512, help="samples of each model")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    found = {f"over-fitted on {PICTURES}": audited(overfit(out, args.steps), args.n)}
    if args.run:
        found[f"{args.run}"] = audited(args.run, args.n)
    Console(width=150).print(table(found))
    right = [entry["verdict"].startswith("memorises") == (i == 0) for i, entry in enumerate(found.values())]
    print(json.dumps({"right": all(right), **found}))
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
