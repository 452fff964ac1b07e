"""Which regulariser takes known factors apart? VAE, beta-VAE and FactorVAE on the embedded shapes, over seeds.

    python -m benchmarks.disentanglement --out /tmp/disentanglement --steps 2500 --seeds 3

Two tables: scores of the codes against the factors, as mean ± deviation over seeds, and the rate-distortion curve over
beta. Reported as found: which model wins is for the table to say. Finished models are not trained again.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from calotype import cli
from calotype.autoencoder import load_autoencoder, posterior
from calotype.data import Pictures
from calotype.images import normalize
from calotype.sheet import VARIATIONS, Sheet, read_sheet
from calotype.stage1_vae.disentanglement import SENTENCE, mean_sd, scores, shape_factors

MODELS = {
    "VAE": ["--beta", "1"],
    "beta-VAE, 4": ["--beta", "4"],
    "FactorVAE, 10": ["--regularizer", "tc", "--gamma", "10"],
}
BETAS = (0.25, 0.5, 1, 2, 4)
# Under a weaker likelihood (bernoulli: 5 to 7 nats) there is hardly anything to take apart.
LIKELIHOOD = ["--likelihood", "gaussian", "--likelihood-scale", "0.2"]
COMMON = [*LIKELIHOOD, *"--latent-dim 10 --lr 1e-3 --batch-size 64 --validations 4".split()]
PICTURES = 2000  # whose codes are scored


def main() -> None:
    """Train, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default="shapes", choices=VARIATIONS)
    parser.add_argument("--image-size", default="16")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    words = ["data", args.source, "--image-size", args.image_size, "--val", "0.2", "--out", str(args.out)]
    assert cli.main(words) == 0
    sheet = read_sheet(args.out / "data.json")
    found = {name: [run(args, sheet, name, MODELS[name], seed) for seed in range(args.seeds)] for name in MODELS}
    curve = [run(args, sheet, f"beta {beta}", ["--beta", str(beta)], 0) for beta in BETAS]
    print_scores(found)
    print_curve(curve)
    print(json.dumps({"scores": found, "curve": curve}))


def run(args, sheet: Sheet, name: str, flags: list[str], seed: int) -> dict[str, float]:
    """Train one model, unless it is there, and score its codes."""
    known = {"beta 1": "VAE", "beta 4": "beta-VAE, 4"}.get(name, name)
    out = args.out / f"{known.replace(',', '').replace(' ', '-')}-{seed}"
    words = ["train-vae", str(args.out / "data.json"), *flags, *COMMON, "--steps", str(args.steps)]
    assert cli.main([*words, "--seed", str(seed), "--out", str(out)]) == 0
    figures = json.loads((out / "finished.json").read_text())
    values = math.prod(sheet.image_size) * sheet.channels
    nats = figures["bits_per_dim[val]"] * values * math.log(2)
    measured = {"psnr": figures["psnr[val]"], "rate": figures["rate[val]"], "distortion": nats - figures["rate[val]"]}
    return measured | score(out / "vae", sheet)


@torch.no_grad()
def score(folder: Path, sheet: Sheet) -> dict[str, float]:
    """The disentanglement scores of a saved autoencoder on held-out pictures."""
    vae, pictures = load_autoencoder(folder, "--out"), Pictures(sheet, "val")
    numbers = range(min(PICTURES, len(pictures)))
    x = normalize(torch.stack([pictures[i] for i in numbers]))
    codes = torch.cat([posterior(vae, part)["mean"].flatten(1) for part in x.split(100)])
    indices = [int(pictures.records[i].file) for i in numbers]
    factors, names = shape_factors(sheet.seed, indices, VARIATIONS[sheet.source])
    return scores(codes.numpy(), factors, names, seed=0)


def print_scores(found: dict[str, list[dict[str, float]]]) -> None:
    """One row a model, mean ± deviation over its seeds."""
    names = list(next(iter(found.values()))[0])
    print(f"\n{'':14}" + "".join(f"{name.removeprefix('dci_'):>20}" for name in names))
    for model, runs in found.items():
        summary = mean_sd(runs)
        print(f"{model:14}" + "".join(f"{f'{summary[n][0]:.3f} ± {summary[n][1]:.3f}':>20}" for n in names))
    print(SENTENCE)


def print_curve(curve: list[dict[str, float]]) -> None:
    """Rate and distortion over beta, and whether they are monotone."""
    print(f"\n{'beta':>6} {'rate (nats)':>12} {'distortion (nats)':>18} {'PSNR':>7}")
    for beta, row in zip(BETAS, curve, strict=True):
        print(f"{beta:>6} {row['rate']:>12.2f} {row['distortion']:>18.2f} {row['psnr']:>7.2f}")
    pairs = list(zip(curve, curve[1:]))
    falls = all(a["rate"] > b["rate"] for a, b in pairs)
    rises = all(a["distortion"] < b["distortion"] for a, b in pairs)
    print(f"The rate falls with beta: {falls}; the distortion rises: {rises}.")


if __name__ == "__main__":
    main()
