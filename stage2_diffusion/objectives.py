"""What the network learns to predict, when, and how much each error counts.

An objective maps clean latents z (B, c, h, w), noise eps of the same shape and uniform numbers u (B,) on the CPU to a
loss for each example. It owns its scheduler: what it trains with is what is exported. All of them share one form,

    z_t = alpha z + sigma eps,    loss = weight(alpha, sigma) * |network(z_t, t) - target|^2,

and differ in the path (alpha, sigma), in the target, in the density of the times and in the weight.
"""

import math
from typing import Any, Protocol

import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor, nn

from calotype.pipeline.samplers import make_scheduler
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.denoiser import Prediction

_TIMES = 1000
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_MODE_SCALE = 1.29
_MOST_SNR = 5.0  # gamma of min-SNR


# Paths


class Flow:
    """The straight path of flow matching (Lipman et al. 2023): alpha = 1 - s, sigma = s, t = 1000 s."""

    def at(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, alpha and sigma (B,) at the share s (B,) of the way to pure noise."""
        return _TIMES * s, 1 - s, s

    def trained(self, target: str) -> DPMSolverMultistepScheduler:
        """What was learnt, as diffusers says it."""
        return DPMSolverMultistepScheduler(
            num_train_timesteps=_TIMES, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0
        )


class VariancePreserving:
    """The discrete path of Ho et al. 2020 and Rombach et al. 2022: alpha^2 + sigma^2 = 1, t = floor(1000 s).

    With `zero_terminal_snr` the betas are rescaled so that alpha is 0 at the last time (Lin et al. 2024, algorithm 1).
    """

    def __init__(self, zero_terminal_snr: bool = False):
        self.zero_terminal_snr = zero_terminal_snr
        # diffusers keeps the last alpha a hair above 0, for samplers that divide by it.
        self.alphas_cumprod = self.trained("v").alphas_cumprod

    def at(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, alpha and sigma (B,) at the share s (B,) of the way to pure noise."""
        t = (s * _TIMES).long().clamp_max(_TIMES - 1)
        alpha_bar = self.alphas_cumprod[t]
        return t, alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def trained(self, target: str) -> DPMSolverMultistepScheduler:
        """What was learnt, as diffusers says it."""
        return DPMSolverMultistepScheduler(
            num_train_timesteps=_TIMES,
            **_BETAS,
            prediction_type={"x0": "sample", "v": "v_prediction", "epsilon": "epsilon"}[target],
            use_lu_lambdas=True,
            rescale_betas_zero_snr=self.zero_terminal_snr,
        )


class Path(Protocol):
    """How latents turn into noise."""

    def at(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, alpha and sigma (B,) at the share s (B,) of the way to pure noise."""

    def trained(self, target: str) -> DPMSolverMultistepScheduler:
        """What was learnt, as diffusers says it."""


# Targets: what is predicted, and how an error of it counts as an error of the clean latents


def target_of(name: str, z: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network should say: eps, x0 = z, v = alpha eps - sigma z (Salimans & Ho 2022) or the flow eps - z."""
    return {"epsilon": eps, "x0": z, "v": alpha * eps - sigma * z, "flow": eps - z}[name]


def _error_of_x0(name: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Squared error of x0 for a squared error of 1 of the target, the same z_t given."""
    return {"epsilon": (sigma / alpha) ** 2, "x0": torch.ones_like(sigma), "v": sigma**2, "flow": sigma**2}[name]


# Densities of the time, as maps of a uniform number u (B,) to s (B,) in (0, 1)


def uniform(u: Tensor) -> Tensor:
    """Every time alike."""
    return u


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """s = sigmoid(mean + std n), n ~ N(0, 1): the middle of the path is seen most (Esser et al. 2024, eq. 19)."""
    return (mean + std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))).sigmoid()


def mode(u: Tensor) -> Tensor:
    """s = 1 - u - a (cos^2(pi u / 2) - 1 + u): a hump with heavy tails (Esser et al. 2024, eq. 20, a = 1.29)."""
    return (1 - u - _MODE_SCALE * ((math.pi / 2 * u).cos() ** 2 - 1 + u)).clamp(0, 1)


# Weights of an error of the target


def weight_of(name: str, target: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The factor (B,) of the squared error of the target.

    `none` is 1. `min-snr` weighs errors of x0 by min(SNR, 5) (Hang et al. 2023). `edm` weighs them by 1 + SNR, which is
    the unit weight of EDM's preconditioned network for data of unit variance (Karras et al. 2022, table 1).
    """
    if name == "none":
        return torch.ones_like(sigma)
    snr = (alpha / sigma) ** 2
    of_x0 = snr.clamp_max(_MOST_SNR) if name == "min-snr" else 1 + snr
    return of_x0 * _error_of_x0(target, alpha, sigma)


class Objective:
    """A loss for each example, and the scheduler that belongs to it."""

    def __init__(self, settings: DiffusionSettings):
        self.target = settings.objective
        self.path: Path = Flow() if self.target == "flow" else VariancePreserving(settings.zero_terminal_snr)
        self.weighting = "none" if settings.weighting == "uncertainty" else settings.weighting
        self.settings = settings

    def __call__(self, net: nn.Module, z: Tensor, given: Any, eps: Tensor, u: Tensor) -> Tensor:
        """Losses (B,).

        Where the network tells its log-variance w (B,) too, the loss is error / exp(w) + w, least at w = log of the
        error to be expected at that time (Karras et al. 2024, eq. 21).
        """
        errors, weight, log_variance = self._errors(net, z, given, eps, u)
        if log_variance is None:
            return weight * errors
        return weight * errors / log_variance.exp() + log_variance

    def errors(self, net: nn.Module, z: Tensor, given: Any, eps: Tensor, u: Tensor) -> Tensor:
        """Squared errors (B,) of the target without any weight, to compare networks by."""
        return self._errors(net, z, given, eps, u)[0]

    def scheduler(self) -> SchedulerMixin:
        """UniPC for what was learnt: in 15 steps the nearest to the exact distribution (benchmarks.samplers)."""
        return make_scheduler(self.path.trained(self.target).config, "unipc")

    def times(self, u: Tensor) -> Tensor:
        """s (B,) in [0, 1] for uniform numbers (B,)."""
        settings = self.settings
        if settings.time_density == "logit-normal":
            return logit_normal(u, settings.time_mean, settings.time_std)
        return {"uniform": uniform, "mode": mode}[settings.time_density](u)

    def _errors(self, net, z, given, eps, u) -> tuple[Tensor, Tensor, Tensor | None]:
        t, alpha, sigma = (value.to(z.device, non_blocking=True) for value in self.path.at(self.times(u)))
        a, s = alpha[:, None, None, None], sigma[:, None, None, None]
        prediction: Prediction = net(a * z + s * eps, t, given)
        errors = (prediction.value - target_of(self.target, z, eps, a, s)).square().flatten(1).mean(1)
        return errors, weight_of(self.weighting, self.target, alpha, sigma), prediction.log_variance
