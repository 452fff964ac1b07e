"""Part `samples` of `benchmarks.density`: the prior that a flow is, against N(0, I)."""

import argparse

import torch
from torch import Tensor

from benchmarks.density_anomalies import linked, quietly
from benchmarks.figures import Figure
from calotype import own_features
from calotype.autoencoder import Vae, decode, load_autoencoder, read_facts
from calotype.data import Pictures, evenly_spaced
from calotype.density.flows import load_flow
from calotype.density.generate import draw
from calotype.device import device
from calotype.images import denormalize, image_grid
from calotype.latent_variables import prior_of
from calotype.latents import LatentCache
from calotype.metrics import frechet_distance, moments
from calotype.randomness import normal
from calotype.sheet import read_sheet

_EACH, _SAMPLES = 2000, 5000  # training pictures of a digit, and samples
_KINDS = {  # of the autoencoder: a code of one place with the prior that it was trained with, and a small map
    "code of 32": (["--beta", "1", "--latent-dim", "32"], "nsf"),
    "map of 4x7x7": ([], "glow"),
}


def figures(args: argparse.Namespace) -> list[Figure]:
    """Fréchet distances of both priors to held-out pictures, and sheets of samples."""
    files = [file for k in range(10) for file in sorted((args.mnist / "train" / str(k)).iterdir())[:_EACH]]
    source = linked(args.out / "samples" / "pictures", files, args.mnist / "train")
    found = []
    for name, (words, kind) in _KINDS.items():
        run = args.out / "samples" / name.replace(" ", "-")
        train(run, source, words, kind)
        found += distances(run, name, kind)
    return found


def train(run, source, words: list[str], kind: str) -> None:
    """Sheet, autoencoder, latents and flow."""
    sheet, vae, latents = (str(run / part) for part in ("data.json", "stage1_vae/vae", "latents"))
    quietly(run / "log.txt", ["data", str(source), "--image-size", "28", "--val", "0.1", "--out", str(run)])
    quietly(run / "log.txt", ["train-vae", sheet, *words, "--out", str(run / "stage1_vae")])
    quietly(run / "log.txt", ["encode", sheet, "--vae", vae, "--out", latents])
    quietly(run / "log.txt", ["train-flow", "--latents", latents, "--kind", kind, "--out", str(run / "flow")])


def distances(run, name: str, kind: str) -> list[Figure]:
    """The rows of one autoencoder."""
    sheet = read_sheet(run / "data.json")
    network = own_features.own(sheet, run / "own", "fp32").network
    pictures = Pictures(sheet, "val")
    real = moments(network.of((torch.stack([pictures[i]]) for i in range(len(pictures))), device()))
    vae, flow = load_autoencoder(run / "stage1_vae" / "vae", "--vae"), load_flow(run / "flow" / "prior", "--flow")
    cache = LatentCache(run / "latents", "train")
    labels = cache.gather(torch.tensor(evenly_spaced(len(cache), _SAMPLES)).numpy(), "label")  # a cache is in order
    told = [flow.facts.classes[k] for k in labels]
    made = {"flow": drawn(lambda i, n: draw(flow, vae, told[i : i + n], i))}
    made["N(0, I)"] = drawn(lambda i, n: _from_normal(run, vae, flow.shape, i, n))
    values = {}
    for prior, x in made.items():
        values[prior] = frechet_distance(moments(network.of(x.split(64), device())), real)
        shown = run / f"{'flow' if prior == 'flow' else 'normal'}.png"
        image_grid(x[:48], columns=12).save(shown)
        print(f"{name}, {prior}: {shown}")
    how = f"Fréchet distance in own features, n = {_SAMPLES:,} against {len(pictures):,} held-out pictures"
    return [
        Figure(f"{name}: N(0, I) prior", values["N(0, I)"], "", how=how),
        Figure(f"{name}: {kind} prior", values["flow"], "", values["N(0, I)"], True, how=how),
    ]


@torch.no_grad()
def drawn(batch) -> Tensor:
    """Pictures uint8 (n, C, H, W)."""
    return torch.cat([denormalize(batch(i, min(250, _SAMPLES - i))) for i in range(0, _SAMPLES, 250)])


def _from_normal(run, vae: Vae, shape: tuple[int, int, int], start: int, count: int) -> Tensor:
    """Pictures of latents from the prior of training, or of N(0, I) where the loss was no bound."""
    prior = prior_of(vae, read_facts(run / "stage1_vae" / "vae"))
    z = prior.mean + prior.stddev * normal(0, "prior", start, count, shape)
    return decode(vae, z, (28, 28)).clamp(-1, 1)
