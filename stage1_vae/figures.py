"""The figures of a saved autoencoder on held-out pictures, each with its n and how it was made."""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from calotype import bounds, device
from calotype.data import Pictures, evenly_spaced
from calotype.errors import UserError
from calotype.features import FeatureNetwork, SetDistance
from calotype.images import normalize
from calotype.metrics import psnr, ssim
from calotype.randomness import normal
from calotype.sheet import VARIATIONS, Sheet
from calotype.stage1_vae import disentanglement
from calotype.stage1_vae.columns import measure_pictures
from calotype.stage1_vae.config import EvaluateVaeSettings
from calotype.stage1_vae.gauges import ActiveUnits, CodeUse, Mean
from calotype.stage1_vae.models import latent_shape
from calotype.stage1_vae.perceptual import GradientFeatures, Lpips
from calotype.stage1_vae.subject import Subject, has_noise

BOUND_PICTURES = 1024
FACTOR_PICTURES = 2000
_MOST_UNITS = 1024  # of a code whose single units are asked what they stand for; forests take minutes beyond


class Figure(NamedTuple):
    """A figure of one autoencoder."""

    value: float
    n: int
    how: str


Figures = dict[str, Figure]


class Judge(NamedTuple):
    """What every autoencoder of a command is measured with."""

    settings: EvaluateVaeSettings
    network: FeatureNetwork
    perceptual: GradientFeatures | Lpips

    @property
    def precision(self) -> str:
        """What the autoencoder computes in, as a word of the figures."""
        return str(device.resolve_precision(self.settings.precision)).removeprefix("torch.")


def evaluate(subject: Subject, sheet: Sheet, judge: Judge) -> Figures:
    """All figures of one autoencoder: of its pictures and latents, the bound, the scores against known factors."""
    pictures = Pictures(sheet, "val")
    found = HeldOut(subject, pictures, judge).figures()
    if subject.facts.likelihood:
        found |= bound(subject, pictures, judge)
    if sheet.source in VARIATIONS and obstacle(subject, sheet) is None:
        found |= factor_scores(subject, sheet, judge)
    return found


def _batches(pictures: Pictures, numbers: Sequence[int], size: int, title: str) -> Iterator[tuple[int, Tensor]]:
    """These pictures (B, C, H, W) in [-1, 1] on the device, each batch with the place of its first."""
    for first in track(range(0, len(numbers), size), title, transient=True):
        x = torch.stack([pictures[i] for i in numbers[first : first + size]])
        pictures.refuse_gone()
        yield first, normalize(x.to(device.device()))


class HeldOut:
    """One walk over all held-out pictures: how well they come back, and what their latents look like."""

    def __init__(self, subject: Subject, pictures: Pictures, judge: Judge):
        self.subject, self.pictures, self.judge = subject, pictures, judge
        self.shape = latent_shape(subject.vae, pictures.size)
        self.means: dict[str, Mean] = {}
        self.units = CodeUse(subject.vae.config.num_vq_embeddings) if subject.quantised else ActiveUnits(self.shape)
        self.sets = SetDistance(judge.network)

    @torch.no_grad()
    def figures(self) -> Figures:
        """The figures; raises UserError where the autoencoder has diverged."""
        n, size = len(self.pictures), self.judge.settings.batch_size
        for _, x in _batches(self.pictures, range(n), size, "Reconstructing"):
            self._take(x)
        means = {name: mean.figures(mean.total)[name] for name, mean in self.means.items()}
        if not all(map(math.isfinite, means.values())):
            raise UserError(f"--vae {self.subject.folder} gives nan or infinity; it diverged: train with a lower --lr.")
        return {name: Figure(value, n, how) for name, value, how in (*self._pictures(means), *self._latents(means))}

    def _take(self, x: Tensor) -> None:
        """Take in pictures (B, C, H, W)."""
        code = self.subject.encode(x)
        x_hat = self.subject.decode(code.mean, tuple(x.shape[2:]))
        see = self.judge.perceptual
        values = {"psnr": psnr(x_hat, x), "ssim": ssim(x_hat, x)}
        values["perceptual"] = see.distance(see.features(x_hat), see.features(x))
        values["z"], values["z^2"] = code.mean.flatten(1).mean(1), code.mean.square().flatten(1).mean(1)
        if has_noise(code.std):
            values["variance"] = code.std.square().flatten(1).mean(1)
            values["rate"] = bounds.rate(torch.distributions.Normal(code.mean, code.std), self.subject.prior)
        for name, value in values.items():
            self.means.setdefault(name, Mean(name)).add(value)
        # In units of the prior: what saving did to the coordinates must not decide which unit is active.
        prior = self.subject.prior
        self.units.add(code.numbers if self.subject.quantised else (code.mean - prior.mean) / prior.stddev)
        self.sets.add(x, x_hat)

    def _pictures(self, means: dict[str, float]) -> Iterator[tuple[str, float, str]]:
        z = "the quantised latent" if self.subject.quantised else "the posterior's mean"
        made, network = f"{z} decoded, {self.judge.precision}", self.judge.network
        yield "psnr[val]", means["psnr"], f"dB, mean over held-out pictures, {made}"
        yield "ssim[val]", means["ssim"], f"mean over held-out pictures, {made}"
        words = {"lpips": "LPIPS with VGG16", "gradients": "gradient features by fixed filters, a stand-in for LPIPS"}
        name = self.judge.perceptual.name
        yield f"perceptual[{name}]", means["perceptual"], f"{words[name]}, mean over held-out pictures, {made}"
        frechet, kernel, width = self.sets.figures()
        rough = "" if len(self.pictures) > width else ", rough: no more pictures than features"
        about = f"of reconstructions from held-out pictures, d = {width:,}{rough}: {network.about}, {made}"
        yield f"rfid[{network.name}]", frechet, f"Fréchet distance {about}"
        yield f"rkid[{network.name}]", kernel, f"kernel distance {about}"

    def _latents(self, means: dict[str, float]) -> Iterator[tuple[str, float, str]]:
        z = "quantised latents" if self.subject.quantised else "the posteriors' means"
        variance = max(means["z^2"] - means["z"] ** 2, 0.0)
        yield "latent_mean[val]", means["z"], f"mean of {z}"
        yield "latent_std[val]", math.sqrt(variance), f"standard deviation of {z}"
        if "variance" in means:
            how = "standard deviation of latents as they are sampled; about 1 on pictures like those of training"
            yield "latent_std[sampled]", math.sqrt(variance + means["variance"]), how
        yield from self._units()
        if "rate" in means:
            yield "rate[val]", means["rate"], f"KL(q||p) in nats a picture, closed form, p(z) {self._prior_words()}"

    def _units(self) -> Iterator[tuple[str, float, str]]:
        found = self.units.figures(self.units.total)
        if self.subject.quantised:
            codes = f"{self.subject.vae.config.num_vq_embeddings:,} codes"
            yield "code_usage[val]", found["code_usage"], f"share of {codes} that held-out pictures use"
            yield "perplexity[val]", found["perplexity"], f"exponential of the codes' entropy, {codes}"
            return
        how = f"share of {math.prod(self.shape):,} elements whose posterior mean has a variance above 0.01"
        yield "active_units[val]", found["active_units"], f"{how}, p(z) {self._prior_words()}"

    def _prior_words(self) -> str:
        return "as in training" if self.subject.facts.prior_std else "N(0, I) in the coordinates it was saved in"


@torch.no_grad()
def bound(subject: Subject, pictures: Pictures, judge: Judge) -> Figures:
    """The evidence lower bound and the importance-weighted one, at most 1,024 held-out pictures spread evenly."""
    settings, model, shape = judge.settings, subject.model(), latent_shape(subject.vae, pictures.size)
    numbers = evenly_spaced(len(pictures), BOUND_PICTURES)
    found = []
    for first, x in _batches(pictures, numbers, settings.batch_size, "Bounding"):
        # A stream for each sample: more samples go on where fewer ended, whatever the batch size.
        samples = (normal(settings.seed, f"importance {k}", first, len(x), shape) for k in range(settings.samples))
        weights = bounds.log_weights(model, x, (eps.to(x.device) for eps in samples)).cpu().double()
        found.append(torch.stack([bounds.elbo(weights), bounds.importance_weighted(weights)]))
    elbo, tighter = torch.cat(found, dim=1).mean(1).tolist()
    bit = -math.log(2) * math.prod((subject.vae.config.in_channels, *pictures.size))
    k = settings.samples
    how = f"{subject.facts.likelihood} p(x|z) of 8-bit pictures, {k} samples of z a picture, {judge.precision}"
    values = {
        "elbo[val]": (elbo, "evidence lower bound in nats a picture"),
        "bits_per_dim[elbo]": (elbo / bit, "the same bound in bits per dimension"),
        f"bits_per_dim[iw{k}]": (tighter / bit, "importance-weighted bound in bits per dimension"),
    }
    return {name: Figure(value, len(numbers), f"{what}, {how}") for name, (value, what) in values.items()}


def obstacle(subject: Subject, sheet: Sheet) -> str | None:
    """Why the code of pictures with known factors is not scored, with the way out; None if nothing is in the way."""
    units = math.prod(latent_shape(subject.vae, tuple(sheet.image_size)))
    if units > _MOST_UNITS:
        return f"a code of {units:,} numbers has too many; train with --latent-dim 10 or so."
    if importlib.util.find_spec("sklearn") is None:
        return "they need scikit-learn; pip install 'calotype[eval]'."
    return None


def factor_scores(subject: Subject, sheet: Sheet, judge: Judge) -> Figures:
    """Disentanglement scores of the latents of pictures whose factors are known: at most 2,000, held-out ones first."""
    chosen = _with_factors(sheet)
    settings, codes, indices = judge.settings, [], []
    for pictures, numbers in chosen.values():
        code = measure_pictures(lambda x: subject.encode(x).mean, pictures, numbers, settings.batch_size, "Encoding")
        codes.append(code.reshape(len(code), -1))
        indices += [int(pictures.records[i].file) for i in numbers]
    factors, names = disentanglement.shape_factors(sheet.seed, indices, VARIATIONS[sheet.source])
    found = disentanglement.scores(np.concatenate(codes), factors, names, settings.seed)
    counts = " and ".join(f"{len(numbers):,} {_WORDS[split]}" for split, (_, numbers) in chosen.items())
    how = f"{counts} pictures, {codes[0].shape[1]:,} units against {', '.join(names)}, {judge.precision}"
    return {f"{name}[{'+'.join(chosen)}]": Figure(value, len(indices), how) for name, value in found.items()}


_WORDS = {"val": "held-out", "train": "training"}


def _with_factors(sheet: Sheet) -> dict[str, tuple[Pictures, list[int]]]:
    """Pictures by split and the numbers of those that take part."""
    chosen, left = {}, FACTOR_PICTURES
    for split in ("val", "train"):
        pictures = Pictures(sheet, split)
        numbers = evenly_spaced(len(pictures), left)
        if numbers:
            chosen[split] = (pictures, numbers)
            left -= len(numbers)
    return chosen
