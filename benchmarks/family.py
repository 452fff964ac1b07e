"""Members of the autoencoder family on one source, a few minutes each, beside what they should beat.

    python -m benchmarks.family --sheet RUN/data.json --out /tmp/family --minutes 1.5

RUN/data.json is a data sheet made by `calotype data`, of small pictures with a side that is a power of two.
"""

import argparse
import json
from pathlib import Path

import torch

from calotype import cli
from calotype.autoencoder import load_autoencoder
from calotype.data import Pictures
from calotype.images import normalize
from calotype.sheet import read_sheet

CODE = 32  # numbers of the plain autoencoder's code, and components of the PCA
MEMBERS = {
    "plain, 32 numbers": ["--regularizer", "none", "--latent-dim", str(CODE), "--width", "32"],
    "denoising": ["--regularizer", "none", "--corruption", "gaussian:0.3"],
    "vq, 512 vectors": ["--regularizer", "vq", "--codebook", "512"],
    "fsq, 8,5,5,5": ["--regularizer", "fsq", "--levels", "8,5,5,5"],
}


def main() -> None:
    """Train each member and print what shows that it works."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1.5, help="for each member")
    args = parser.parse_args()
    found = {name: train(args, name, flags) for name, flags in MEMBERS.items()}
    sheet = read_sheet(args.sheet)
    plain = args.out / slug("plain, 32 numbers") / "vae"
    rows = [
        ("plain, 32 numbers", "test MSE", mse_of(plain, sheet), f"below PCA-{CODE}: {pca_mse(sheet):.5f}"),
        ("denoising", "denoised PSNR", found["denoising"]["psnr_denoised[val]"], gain(found["denoising"])),
        ("vq, 512 vectors", "code usage", found["vq, 512 vectors"]["code_usage[val]"], ">= 0.9"),
        ("vq, 512 vectors", "perplexity", found["vq, 512 vectors"]["perplexity[val]"], ""),
        ("vq, 512 vectors", "PSNR", found["vq, 512 vectors"]["psnr[val]"], ""),
        ("fsq, 8,5,5,5", "code usage", found["fsq, 8,5,5,5"]["code_usage[val]"], ">= 0.9"),
        ("fsq, 8,5,5,5", "PSNR", found["fsq, 8,5,5,5"]["psnr[val]"], ""),
    ]
    for name, figure, value, goal in rows:
        print(f"{name:20} {figure:16} {value:10.5g}   {goal}")
    print(json.dumps(found))


def train(args, name: str, flags: list[str]) -> dict:
    """Train one member; returns the figures of its last validation."""
    out = args.out / slug(name)
    words = ["train-vae", str(args.sheet), "--max-minutes", str(args.minutes), *flags, "--out", str(out)]
    assert cli.main(words) == 0, words
    return json.loads((out / "finished.json").read_text())


def slug(name: str) -> str:
    """A name as a folder."""
    return name.replace(",", "").replace(" ", "-")


def gain(found: dict) -> str:
    """What a denoiser has to reach."""
    return f">= damaged + 5 dB: {found['psnr_damaged[val]'] + 5:.2f}"


@torch.no_grad()
def mse_of(folder: Path, sheet) -> float:
    """Mean squared error of a saved autoencoder over the held-out pictures, in [-1, 1]."""
    vae, total = load_autoencoder(folder, "--out"), 0.0
    parts = held_out(sheet).split(250)
    for x in parts:
        total += (vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x).square().mean().item() * len(x)
    return total / sum(map(len, parts))


def pca_mse(sheet) -> float:
    """Mean squared error of the first components of the training pictures, over the held-out ones."""
    train_pictures = Pictures(sheet, "train")
    step = max(1, len(train_pictures) // 20_000)
    x = normalize(torch.stack([train_pictures[i] for i in range(0, len(train_pictures), step)])).flatten(1)
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
    basis = vectors[:, -CODE:]
    y = held_out(sheet).flatten(1) - mean
    return (y @ basis @ basis.T - y).square().mean().item()


def held_out(sheet) -> torch.Tensor:
    """The held-out pictures (N, C, H, W) in [-1, 1]."""
    pictures = Pictures(sheet, "val")
    return normalize(torch.stack([pictures[i] for i in range(len(pictures))]))


if __name__ == "__main__":
    main()
