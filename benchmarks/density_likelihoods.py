"""Part `likelihoods` of `benchmarks.density`: the ODE likelihood where the truth is known, and bounds of a VAE."""

import argparse
import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from benchmarks.density_anomalies import fitted
from benchmarks.figures import Figure
from calotype.autoencoder import decode, load_autoencoder, posterior, read_facts
from calotype.bounds import elbo, importance_weighted, log_weights
from calotype.data import Pictures, evenly_spaced
from calotype.density.diffusion import early
from calotype.density.flows import bits_per_dim
from calotype.density.ode import Exact, Hutchinson, RungeKutta, Trace, carry
from calotype.images import normalize
from calotype.latent_variables import model_of
from calotype.randomness import normal
from calotype.sheet import read_sheet

_DIMENSIONS = 6
_MEAN = torch.tensor([1.0, -0.5, 0.3, 0.0, 2.0, -1.0])
_SAMPLES = (1, 8, 64)
_PICTURES = 256


def figures(args: argparse.Namespace) -> list[Figure]:
    """The rows."""
    return [*gaussian(), *bounds(args)]


def gaussian() -> list[Figure]:
    """Error of the ODE likelihood, in percent of the truth, of a slanted Gaussian with its exact velocity."""
    basis = torch.linalg.qr(normal(0, "basis", 0, _DIMENSIONS, (_DIMENSIONS,)))[0]
    spread = torch.tensor([0.2, 0.5, 0.8, 1.0, 1.5, 2.0])
    covariance = basis @ torch.diag(spread**2) @ basis.T
    data = MultivariateNormal(_MEAN, covariance)
    z = _MEAN + normal(0, "points", 0, 64, (_DIMENSIONS,)) @ torch.linalg.cholesky(covariance).T
    truth = data.log_prob(z)
    found = []
    for name, path in (("flow", straight), ("variance-preserving", circular)):
        slope = path(_MEAN, covariance)
        for how, trace in (("exact trace", Exact()), ("16 probes", Hutchinson(16, positions=range(64)))):
            error = (_log_prob(slope, trace, z) - truth).abs().mean() / truth.abs().mean()
            found.append(Figure(f"ODE likelihood of a Gaussian, {name}, {how}", 100 * error.item(), "%", 1, True,
                                how="mean error of 64 points over mean |log p|"))  # fmt: skip
    return found


def _log_prob(slope, trace: Trace, z: Tensor) -> Tensor:
    """log p(z) (B,) by the ODE in 32 steps."""
    carried = carry(early(slope), trace, z, 0.0, 1.0, RungeKutta(32))
    eps = carried.z
    return carried.change - 0.5 * (eps.square().sum(1) + eps.shape[1] * math.log(2 * math.pi))


def straight(mean: Tensor, covariance: Tensor):
    """The velocity E[eps - z_0 | z] of flow matching for z_0 of this Gaussian."""

    def slope(z: Tensor, s: float) -> Tensor:
        total = (1 - s) ** 2 * covariance + s**2 * torch.eye(len(mean))
        centred = torch.linalg.solve(total, (z - (1 - s) * mean).T).T
        return s * centred - mean - (1 - s) * centred @ covariance

    return slope


def circular(mean: Tensor, covariance: Tensor):
    """The velocity of z = cos(phi) z_0 + sin(phi) eps, with phi = s pi / 2."""

    def slope(z: Tensor, s: float) -> Tensor:
        cosine, sine = math.cos(s * math.pi / 2), math.sin(s * math.pi / 2)
        total = cosine**2 * covariance + sine**2 * torch.eye(len(mean))
        centred = torch.linalg.solve(total, (z - cosine * mean).T).T
        return math.pi / 2 * (cosine * sine * centred - sine * (mean + cosine * centred @ covariance))

    return slope


@torch.no_grad()
def bounds(args: argparse.Namespace) -> list[Figure]:
    """Bits per dimension by the bounds of the autoencoder of a digit, which must fall with samples."""
    run = fitted(args, "digit-3", args.mnist / "train" / "3")
    folder = run / "stage1_vae" / "vae"
    vae, facts = load_autoencoder(folder, "--vae"), read_facts(folder)

    def q(x: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(*posterior(vae, x).values())

    model = model_of(vae, facts, q, lambda z, size: decode(vae, z, size).clamp(-1, 1))
    pictures = Pictures(read_sheet(run / "data.json"), "val")
    x = normalize(torch.stack([pictures[i] for i in evenly_spaced(len(pictures), _PICTURES)]))
    shape = tuple(q(x[:1]).mean.shape[1:])
    weights = log_weights(model, x, (normal(0, f"sample {k}", 0, len(x), shape) for k in range(max(_SAMPLES))))
    bits = [bits_per_dim(importance_weighted(weights[:k]), x[0].numel()).mean().item() for k in _SAMPLES]
    lower = bits_per_dim(elbo(weights), x[0].numel()).mean().item()
    how = f"{len(x)} held-out pictures"
    found = [Figure("ELBO", lower, "bits/dim", how=how)]
    found += [Figure(f"importance-weighted, {k}", b, "bits/dim", how=how) for k, b in zip(_SAMPLES, bits, strict=True)]
    gains = [before - after for before, after in zip([lower, *bits[1:]], bits[1:], strict=False)]
    found.append(Figure("least gain: ELBO, 8, 64 samples", min(gains), "bits/dim", 0.0, how="never negative"))
    return found
