"""What the models of a run say of a batch of pictures: a row for each likelihood, log p picture by picture."""

import math
from typing import NamedTuple

from torch import Tensor

from calotype import bounds, device
from calotype.density import diffusion
from calotype.density.config import LikelihoodSettings
from calotype.density.examples import dequantize
from calotype.density.flows import bits_per_dim, log_normal
from calotype.density.ode import Dopri5, Heun, RungeKutta, Solver
from calotype.density.run_models import RunModels
from calotype.errors import UserError
from calotype.images import normalize
from calotype.pipeline.order import Label
from calotype.randomness import normal, uniform

_LEVELS = 128  # of a picture's 256 in a unit of [-1, 1]


class Batch(NamedTuple):
    """Pictures uint8 (B, C, H, W) with the place of the first among those chosen, their classes and captions."""

    x: Tensor
    first: int
    labels: list[str]
    texts: list[str]

    @property
    def positions(self) -> range:
        """The place of each."""
        return range(self.first, self.first + len(self.x))


class Row(NamedTuple):
    """What one likelihood is: of what, how many numbers that has, and what it is exact about; log p (n,) in nats."""

    of: str  # pictures or latents
    dimensions: int
    exact: str
    log_prob: Tensor

    def figures(self) -> dict:
        """Mean and standard error in bits per dimension, and how they came about."""
        bits = bits_per_dim(self.log_prob, self.dimensions)
        return {
            "value": bits.mean().item(),
            "se": (bits.std() / math.sqrt(len(bits))).item(),
            "n": len(bits),
            "of": self.of,
            "dimensions": self.dimensions,
            "nats": self.log_prob.mean().item(),
            "exact": self.exact,
        }


class Measurement:
    """One batch under all models."""

    def __init__(self, models: RunModels, batch: Batch, settings: LikelihoodSettings):
        self.models, self.batch, self.settings = models, batch, settings
        self.x = normalize(batch.x.to(device.device()))
        self.code = models.encode(self.x, settings.seed, batch.first)

    def rows(self) -> dict[str, Row]:
        """Every likelihood that the models know, by name; those of pictures first."""
        priors = self._of_latents()
        return self._of_pictures(priors) | priors

    def _of_latents(self) -> dict[str, Row]:
        z, d = self.code.z, self.code.z[0].numel()
        sample = "one sample of q(z|x)" if self.code.std is not None else "the code"
        rows = {
            "normal": Row("latents", d, f"N(0, I) at {sample}, to compare with: exact.", log_normal(z).double().cpu())
        }
        flow = self.models.flow
        if flow is not None and flow.facts.of == "latents":
            spread = f", with noise of {flow.facts.noise:g}," if flow.facts.noise else ""
            exact = (
                f"flow ({flow.kind}{self._told}): exact density of the latent{spread} at {sample}, not of the picture."
            )
            rows["flow"] = Row("latents", d, exact, self.models.flow_log_prob(self._spread(z), self._flow_labels()))
        if self.models.pipe is not None and not self.models.pipe.takes_image:
            rows["diffusion"] = Row("latents", d, self._ode_sentence(sample), self._by_the_ode(z))
        return rows

    def _of_pictures(self, priors: dict[str, Row]) -> dict[str, Row]:
        flow = self.models.flow
        rows = {"flow": self._of_pixels()} if flow is not None and flow.facts.of == "pixels" else {}
        if not self.models.facts.likelihood or self.code.std is None:
            return rows
        k, d = self.settings.samples, self.x[0].numel()
        weights = self.models.weights(self.x, self.code, self.settings.seed, self.batch.first, k)
        lower = f"ELBO: a lower bound on log p(x) of 8-bit pictures, estimated by {k} samples of z."
        tighter = f"importance-weighted bound with {k} samples: tighter on average, and still below log p(x)."
        rows["elbo"] = Row("pictures", d, lower, bounds.elbo(weights))
        rows[f"iw{k}"] = Row("pictures", d, tighter, bounds.importance_weighted(weights))
        return rows | self._under_other_priors(weights[0], priors)

    def _under_other_priors(self, weights: Tensor, priors: dict[str, Row]) -> dict[str, Row]:
        """The ELBO with a learnt prior, from the log-weights (B,) at the sample whose density is known."""
        own = self.models.model(self.code).prior.log_prob(self.code.z).flatten(1).sum(1).double().cpu()
        rows = {}
        for name in ("flow", "diffusion"):
            if name in priors and not (name == "flow" and self.models.flow.facts.noise):
                exact = (
                    f"ELBO with the {name} for p(z) in place of N(0, I): a bound of the same kind, by one sample of z."
                )
                rows[f"elbo[{name}]"] = Row("pictures", self.x[0].numel(), exact, weights - own + priors[name].log_prob)
        return rows

    def _of_pixels(self) -> Row:
        """A flow of pictures: the mean of its log-density over bins of levels is below the log of their mass."""
        x, shape = self.batch.x.to(self.x.device), tuple(self.x.shape[1:])
        u = uniform(self.settings.seed, "likelihood/bins", self.batch.first, len(x), shape).to(x.device)
        found = self.models.flow_log_prob(dequantize(x, u), self._flow_labels()) - math.prod(shape) * math.log(_LEVELS)
        exact = (
            f"flow ({self.models.flow.kind}{self._told}): exact for pictures spread over the bins of their levels, a "
        )
        return Row("pictures", math.prod(shape), exact + "lower bound on log p(x) of 8-bit ones, by one sample.", found)

    def _spread(self, z: Tensor) -> Tensor:
        noise = self.models.flow.facts.noise
        eps = normal(self.settings.seed, "likelihood/noise", self.batch.first, len(z), tuple(z.shape[1:]))
        return z + noise * eps.to(z)

    def _flow_labels(self) -> list[str] | None:
        """Class names for a flow that is to be told them."""
        if not self.settings.labels or not self.models.flow.classes:
            return None
        return _known(self.batch.labels, list(self.models.flow_classes), "flow")

    @property
    def _told(self) -> str:
        if not self.models.flow.classes:
            return ""
        return ", told the label" if self.settings.labels else ", mixture over classes"

    def _by_the_ode(self, z: Tensor) -> Tensor:
        return self.models.diffusion_log_prob(z, self._words(), way_of(self.settings), self.batch.positions)

    def _words(self) -> list[Label] | None:
        """Labels or prompts for the diffusion model, where it is to be told them."""
        pipe = self.models.pipe
        if not self.settings.labels or not (pipe.labels or pipe.condition == "text"):
            return None
        return (
            self.batch.texts if pipe.condition == "text" else _known(self.batch.labels, pipe.labels, "diffusion model")
        )

    def _ode_sentence(self, sample: str) -> str:
        noise, told = diffusion.least_noise(self.models.pipe), ", told the label" if self._words() else ""
        spread = f" with noise of {noise:.2g}" if noise else ""
        trace = "" if self.settings.exact_trace else " and Hutchinson's noise"
        return (
            f"diffusion{told}: density of the latent{spread} under the probability-flow ODE at {sample}, exact up "
            f"to the solver's error{trace}; not of the picture."
        )


def _known(labels: list[str], names: list[str], what: str) -> list[str]:
    strange = next((label for label in labels if label not in names), None)
    if strange is not None:
        raise UserError(f"--labels: {strange!r} is no class that the {what} knows; leave --labels out.")
    return labels


def way_of(settings: LikelihoodSettings) -> diffusion.Way:
    """How the ODE is solved, and the trace found."""
    solvers: dict[str, Solver] = {
        "rk4": RungeKutta(settings.ode_steps or 8),
        "heun": Heun(settings.ode_steps or 20),
        "dopri5": Dopri5(settings.tolerance, settings.tolerance),
    }
    probes = 0 if settings.exact_trace else settings.probes
    return diffusion.Way(solvers[settings.solver], probes, seed=settings.seed, batch_size=settings.batch_size)
