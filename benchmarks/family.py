"""Every member of the autoencoder family on one source, minutes each, beside what it should beat.

    python -m benchmarks.family --sheet RUN/data.json --out /tmp/family --minutes 2

RUN/data.json is a data sheet of grey 32x32 pictures made by `calotype data` (measured on MNIST, padded). Members are
trained one after the other, about half an hour at two minutes each; finished ones are not trained again.
FactorVAE and the scores against known factors are in `benchmarks.disentanglement`.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch

from calotype import cli
from calotype.autoencoder import decode, load_autoencoder, posterior
from calotype.data import Pictures, evenly_spaced
from calotype.images import normalize
from calotype.metrics import psnr
from calotype.sheet import Sheet, read_sheet
from calotype.stage1_vae.corruption import parse_corruption

CODE = 32  # numbers of the plain autoencoder's code, and components of the PCA
VAE = ["--factor", "8", "--latent-channels", "2", "--likelihood", "gaussian"]
STRONG = ["--latent-dim", "32", "--width", "32", "--likelihood", "bernoulli", "--lr", "2e-3"]
MEMBERS = {
    "plain 4x4x2": ["--regularizer", "none", "--factor", "8", "--latent-channels", "2"],
    "plain 1x1x32": ["--regularizer", "none", "--latent-dim", "32", "--lr", "1e-3"],
    "plain f4": ["--regularizer", "none"],
    "denoising": ["--regularizer", "none", "--corruption", "gaussian:0.3"],
    "beta 0.25": [*VAE, "--beta", "0.25"],
    "beta 1": [*VAE, "--beta", "1"],
    "beta 4": [*VAE, "--beta", "4"],
    "strong, beta 4": [*STRONG, "--beta", "4"],
    "strong, free bits": [*STRONG, "--beta", "4", "--free-bits", "0.5"],
    "vq 512": ["--regularizer", "vq", "--codebook", "512"],
    "fsq 8,5,5,5": ["--regularizer", "fsq", "--levels", "8,5,5,5", "--lr", "1e-3"],
    "two numbers, 32x32": ["--latent-dim", "2", "--beta", "1", "--lr", "1e-3"],
    "two numbers, 12x12": ["--latent-dim", "2", "--beta", "1", "--lr", "1e-3"],
}


class Row(NamedTuple):
    """A figure and its goal; `met` is None where nothing was asked for."""

    member: str
    figure: str
    value: float
    goal: str = ""
    met: bool | None = None


def main() -> None:
    """Train each member and print what shows that it works."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=2.0, help="for each member")
    parser.add_argument("--only", nargs="+", default=list(MEMBERS), choices=list(MEMBERS))
    args = parser.parse_args()
    family = Family(args.sheet, args.out, args.minutes)
    rows = [row for group, members in GROUPS.items() if set(members) <= set(args.only) for row in group(family)]
    for row in rows:
        met = {True: "met", False: "MISSED", None: ""}[row.met]
        print(f"{row.member:20} {row.figure:26} {row.value:10.5g}   {row.goal:34} {met}")
    print(json.dumps([row._asdict() for row in rows]))


class Family:
    """The source and its trained members."""

    def __init__(self, sheet: Path, out: Path, minutes: float):
        self.file, self.out, self.minutes = sheet, out, minutes
        self.sheet: Sheet = read_sheet(sheet)

    def train(self, name: str, sheet: Path | None = None) -> dict[str, float]:
        """Train one member; returns the figures of its last validation."""
        words = ["train-vae", str(sheet or self.file), "--max-minutes", str(self.minutes), *MEMBERS[name]]
        assert cli.main([*words, "--out", str(self.folder(name))]) == 0, words
        return json.loads((self.folder(name) / "finished.json").read_text())

    def folder(self, name: str) -> Path:
        """The run folder of a member."""
        return self.out / name.replace(",", "").replace(" ", "-")

    def held_out(self, most: int = 10_000) -> torch.Tensor:
        """Held-out pictures (N, C, H, W) in [-1, 1]."""
        pictures = Pictures(self.sheet, "val")
        return normalize(torch.stack([pictures[i] for i in evenly_spaced(len(pictures), most)]))

    @torch.no_grad()
    def reconstruct(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x_hat (N, C, H, W) of a saved member, from the posterior's mean."""
        vae = load_autoencoder(self.folder(name) / "vae", "--out")
        size = tuple(x.shape[2:])
        return torch.cat([decode(vae, posterior(vae, part)["mean"], size).clamp(-1, 1) for part in x.split(250)])


def plain(family: Family) -> list[Row]:
    """A plain autoencoder's error against as many principal components."""
    x, reference = family.held_out(), pca_mse(family)
    rows = []
    for name in ("plain 4x4x2", "plain 1x1x32"):
        family.train(name)
        mse = (family.reconstruct(name, x) - x).square().mean().item()
        rows.append(Row(name, "test MSE, n = 10,000", mse, f"< PCA-{CODE}: {reference:.5f}", mse < reference))
    return rows


def denoising(family: Family) -> list[Row]:
    """A denoising autoencoder against the damaged pictures, and against a plain autoencoder given them."""
    for name in ("plain f4", "denoising"):
        family.train(name)
    x = family.held_out(2000)
    damaged = parse_corruption("gaussian:0.3")(x, 0, 0, "benchmark")
    noisy = psnr(damaged.clamp(-1, 1), x).mean().item()
    by = {name: psnr(family.reconstruct(name, damaged), x).mean().item() for name in ("plain f4", "denoising")}
    found = by["denoising"]
    return [
        Row("denoising", "denoised PSNR, n = 2,000", found, f">= noisy + 5: {noisy + 5:.2f}", found >= noisy + 5),
        Row("denoising", "denoised PSNR", found, f"> plain's: {by['plain f4']:.2f}", found > by["plain f4"]),
    ]


def variational(family: Family) -> list[Row]:
    """The bounds of a VAE, and the rate-distortion curve over beta."""
    figures = {name: family.train(name) for name in ("beta 0.25", "beta 1", "beta 4")}
    bounds = evaluate(family, "beta 1")
    elbo, weighted = (bounds[f"bits_per_dim[{name}]"] for name in ("elbo", "iw64"))
    rows = [
        Row("beta 1", f"ELBO, bits/dim, n = {elbo['n']:,}", elbo["value"]),
        Row("beta 1", "IW-64, bits/dim", weighted["value"], "<= ELBO's", weighted["value"] <= elbo["value"]),
    ]
    rates = [f["rate[val]"] for f in figures.values()]
    psnrs = [f["psnr[val]"] for f in figures.values()]
    falls, sharper = rates == sorted(rates, reverse=True), psnrs == sorted(psnrs, reverse=True)
    for name, rate, quality in zip(figures, rates, psnrs, strict=True):
        rows.append(Row(name, "rate, nats", rate, "falls with beta", falls))
        rows.append(Row(name, "PSNR", quality, "falls with beta", sharper))
    return rows


def free_bits(family: Family) -> list[Row]:
    """What free bits save of a code that a strong pull empties."""
    without, kept = (family.train(name)["active_units[val]"] for name in ("strong, beta 4", "strong, free bits"))
    return [
        Row("strong, beta 4", "active units", without, "near 0", without <= 0.1),
        Row("strong, free bits", "active units", kept, ">= 0.5", kept >= 0.5),
    ]


def quantised(family: Family) -> list[Row]:
    """How much of a codebook or a grid held-out pictures use."""
    rows = []
    for name in ("vq 512", "fsq 8,5,5,5"):
        family.train(name)
        found = evaluate(family, name)  # of every held-out picture, with revival off
        usage, n = found["code_usage[val]"]["value"], found["code_usage[val]"]["n"]
        rows.append(Row(name, f"code usage, n = {n:,}", usage, ">= 0.9", usage >= 0.9))
        rows.append(Row(name, "perplexity", found["perplexity[val]"]["value"]))
        rows.append(Row(name, "PSNR", found["psnr[val]"]["value"]))
    return rows


def two_numbers(family: Family) -> list[Row]:
    """A code of two numbers for large and small pictures, against the best that no code can do."""
    small = family.out / "small" / "data.json"
    source = ["--image-size", "12", "--val", family.sheet.val, "--out", str(small.parent)]
    assert cli.main(["data", family.sheet.source, *source]) == 0
    rows = []
    for name, sheet in (("two numbers, 32x32", None), ("two numbers, 12x12", small)):
        found = family.train(name, sheet)
        x = Family(sheet, family.out, 0).held_out(2000) if sheet else family.held_out(2000)
        grey = psnr(x.mean(0, keepdim=True).expand_as(x), x).mean().item()
        value = found["psnr[val]"]
        rows.append(Row(name, "PSNR", value, f"> mean picture + 1: {grey + 1:.2f}", value > grey + 1))
    return rows


GROUPS = {
    plain: ["plain 4x4x2", "plain 1x1x32"],
    denoising: ["plain f4", "denoising"],
    variational: ["beta 0.25", "beta 1", "beta 4"],
    free_bits: ["strong, beta 4", "strong, free bits"],
    quantised: ["vq 512", "fsq 8,5,5,5"],
    two_numbers: ["two numbers, 32x32", "two numbers, 12x12"],
}


def evaluate(family: Family, name: str) -> dict:
    """What `calotype evaluate-vae` finds."""
    file = family.folder(name) / "evaluation.json"
    words = ["evaluate-vae", str(family.file), "--vae", str(family.folder(name) / "vae"), "--out", str(file)]
    assert cli.main(words) == 0
    return json.loads(file.read_text())


def pca_mse(family: Family) -> float:
    """Mean squared error of the first components of 20,000 training pictures, over the held-out ones."""
    pictures = Pictures(family.sheet, "train")
    numbers = evenly_spaced(len(pictures), 20_000)
    x = normalize(torch.stack([pictures[i] for i in numbers])).flatten(1)
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
    basis = vectors[:, -CODE:]
    y = family.held_out().flatten(1) - mean
    return (y @ basis @ basis.T - y).square().mean().item()


if __name__ == "__main__":
    main()
