"""Scores of how strange a picture is, higher is stranger, from the networks of a run, and what each is exact about."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

from calotype import device
from calotype.autoencoder import Facts, Vae, decode, load_autoencoder, posterior, read_facts
from calotype.bounds import elbo, log_weights
from calotype.checkpoint import weights_hash
from calotype.density.calibration import Scores
from calotype.density.flows import Flow, bits_per_dim, load_flow, log_normal
from calotype.errors import UserError
from calotype.images import denormalize, to_pil
from calotype.latent_variables import model_of, refuse_odd_facts
from calotype.randomness import normal

SENTENCES = {
    "reconstruction": "Mean squared error of the picture that comes back from its code; exact, but no likelihood.",
    "elbo": "Bits per dimension by the autoencoder's bound: an estimate of what bounds -log p(picture) from above.",
    "flow": "Bits per dimension of the code under the flow: the exact density of the code, not of the picture.",
    "diffusion": "Bits per dimension of the latent by the probability-flow ODE: of the latent, not of the picture, and "
    "exact up to the solver and the estimate of a trace.",
    "typicality": "How far likelihoods, their parts, the error and what PNG needs are from usual, on both sides, in "
    "nats: a picture likelier than normal ones is strange too.",
    "knn": "Distance of the code to the third nearest normal one, in deviations; exact, but no likelihood.",
    "combination": "Mean surprise of all scores, in nats: calibrated on held-out normal pictures, of which alone its p "
    "and threshold are promises.",
}
_SAMPLES = 1  # of z for the bound: each decodes the picture once more, and more of them rank no better
_LEAST = 1e-6  # below any error that 8 bits can show
_FLAT = 1e-3  # variance of a picture in [-1, 1] of which nothing is to be explained


class Measured(NamedTuple):
    """What networks say of pictures: scores and statistics (B,) each, latents (B, c, h, w), squared error (B, H, W)."""

    scores: Scores
    statistics: Scores
    z: Tensor
    error: Tensor


class Networks:
    """The networks of a run that scores come from."""

    def __init__(self, vae: Vae, facts: Facts, flow: Flow | None, ode: Callable[[Tensor], Tensor] | None = None):
        self.vae, self.facts, self.flow, self.ode = vae, facts, flow, ode
        self._precision = "fp32"

    @classmethod
    def open(cls, run: Path, flow: bool, diffusion: bool, precision: str = "fp32") -> "Networks":
        """Those of a run folder, on their device; raises UserError."""
        vae = load_autoencoder(run / "stage1_vae" / "vae", "MODEL").to(device.device())
        device.for_drawing(vae)
        facts = read_facts(run / "stage1_vae" / "vae")
        if facts.likelihood:
            refuse_odd_facts(f"MODEL {run / 'stage1_vae' / 'vae'}", vae, facts)
        net = load_flow(run / "flow" / "prior", "MODEL").to(device.device()) if flow else None
        networks = cls(vae, facts, net, _ode(run) if diffusion else None)
        networks._precision = precision
        return networks

    @torch.no_grad()
    def measure(self, x: Tensor) -> Measured:
        """Scores and statistics of pictures x (B, C, H, W) in [-1, 1]."""
        x = x.to(device.device())
        size = tuple(x.shape[2:])
        q = self._posterior(x)
        error = (self._decode(q["mean"], size).clamp(-1, 1) - x).square()
        mean = error.flatten(1).mean(1)
        found = {**self._bound(q, x), **self._density(q["mean"])}
        scores = {"reconstruction": mean} | {name: value for name, value in found.items() if name in SENTENCES}
        statistics = found | {"log error": (mean + _LEAST).log(), "unexplained": _unexplained(mean, x)}
        statistics["complexity"] = complexity(x)
        if "elbo" in found:
            statistics["elbo less complexity"] = found["elbo"] - statistics["complexity"].to(x.device)
        return Measured(_plain(scores), _plain(statistics), q["mean"].cpu(), error.mean(1).cpu())

    def _posterior(self, x: Tensor) -> dict[str, Tensor]:
        with device.autocast(self._precision):
            return posterior(self.vae, x)

    def _decode(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        with device.autocast(self._precision):
            return decode(self.vae, z, size)

    def _bound(self, q: dict[str, Tensor], x: Tensor) -> Scores:
        """The negative ELBO, where the autoencoder is one of a bound; with the same noise for every picture."""
        if self.facts.likelihood is None or "std" not in q:
            return {}
        model = model_of(self.vae, self.facts, lambda _: Normal(q["mean"], q["std"]), self._decode)
        shape = tuple(q["mean"].shape[1:])
        noise = (normal(0, "anomaly/elbo", k, 1, shape).to(x.device).expand_as(q["mean"]) for k in range(_SAMPLES))
        return {"elbo": bits_per_dim(elbo(log_weights(model, x, noise)), x[0].numel())}

    def _density(self, z: Tensor) -> Scores:
        """Minus log p of the latents, and the two parts of it where the flow is told no class."""
        found, bits = {}, partial(bits_per_dim, dimensions=z[0].numel())
        if self.flow is not None and self.flow.classes:
            found = {"flow": bits(self.flow.log_prob(z))}
        elif self.flow is not None:
            eps, ladj = self.flow(z)
            found = {"flow": bits(log_normal(eps) + ladj)}
            found |= {"log norm of eps": eps.flatten(1).norm(dim=1).log(), "log-determinant": ladj}
        return found | ({} if self.ode is None else {"diffusion": bits(self.ode(z))})


def hashes(run: Path, flow: bool, diffusion: bool) -> dict[str, str]:
    """The hash of each network's folder, by its path in the run; raises UserError where one is missing."""
    names = ["stage1_vae/vae", *(["flow/prior"] if flow else []), *(["pipeline/unet"] if diffusion else [])]
    for name in names:
        if not (run / name / "config.json").is_file():
            raise UserError(f"MODEL {run} has no {name}, which its detector needs; run `calotype anomaly fit` again.")
    return {name: weights_hash(run / name) for name in names}


def codes_of(z: Tensor, most: int = 512) -> Tensor:
    """Latents (B, c, h, w) as codes (B, d), places being averaged until d is at most `most`, or one place is left."""
    side = max(z.shape[2:])
    while z[0].numel() > most and side > 1:
        side = (side + 1) // 2
        z = F.adaptive_avg_pool2d(z, [min(side, length) for length in z.shape[2:]])
    return z.flatten(1)


def complexity(x: Tensor) -> Tensor:
    """Bits per dimension (B,) in which PNG keeps pictures x (B, C, H, W) in [-1, 1].

    A likelihood is high for what is simple; beside what any compressor makes of the same picture it says how well the
    model itself knows it (Serra et al. 2020).
    """
    return torch.tensor([8 * _png_bytes(pixels) / pixels.numel() for pixels in denormalize(x.cpu())])


def _png_bytes(pixels: Tensor) -> int:
    stream = io.BytesIO()
    to_pil(pixels).save(stream, "PNG")
    return stream.tell()


def _unexplained(error: Tensor, x: Tensor) -> Tensor:
    """The log of the share of a picture's variance that its reconstruction leaves: easy pictures have small errors."""
    return ((error + _LEAST) / (x.flatten(1).var(1) + _FLAT)).log()


def _plain(values: Scores) -> Scores:
    """As float64 on the CPU; what has left the range of numbers is as large as they go."""
    limit = 1e12
    return {k: v.double().cpu().nan_to_num(limit, limit, -limit).clamp(-limit, limit) for k, v in values.items()}


def _ode(run: Path) -> Callable[[Tensor], Tensor]:
    """log p(z) (B,) in nats by the diffusion model of a run, told no label; all pictures share the trace's probes."""
    from calotype.density.diffusion import log_prob
    from calotype.pipeline.model_folder import load

    pipe = load(run / "pipeline")
    return lambda z: log_prob(pipe, z).to(z.device)
