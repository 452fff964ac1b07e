"""What the network learns to predict, and the scheduler that draws with it afterwards.

An objective maps clean latents z (B, c, h, w), noise eps of the same shape and uniform numbers u (B,) on the CPU
to a loss for each example. It owns its scheduler: what it trains with is what is exported.
"""

from typing import Protocol

import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor, nn

_TIMES = 1000
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class Objective(Protocol):
    """A loss for each example, and the scheduler that belongs to it."""

    def __call__(self, unet: nn.Module, z: Tensor, y: Tensor | None, eps: Tensor, u: Tensor) -> Tensor:
        """Losses (B,)."""

    def scheduler(self) -> SchedulerMixin:
        """A sampler for what was learnt, with its config written in full."""


class FlowMatching:
    """Rectified flow (Lipman et al. 2023; Esser et al. 2024): z_s = (1 - s) z + s eps, target eps - z.

    Time s is logit-normal: s = sigmoid(n) with n ~ N(0, 1), so that the middle of the path is seen most.
    """

    def __call__(self, unet: nn.Module, z: Tensor, y: Tensor | None, eps: Tensor, u: Tensor) -> Tensor:
        """Losses (B,); the network is called with t = 1000 s."""
        s = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid().to(z.device, non_blocking=True)
        weight = s[:, None, None, None]
        v = unet((1 - weight) * z + weight * eps, _TIMES * s, class_labels=y).sample
        return (v - (eps - z)).square().flatten(1).mean(1)

    def scheduler(self) -> SchedulerMixin:
        """DPM-Solver++(2M) over the flow's own noise levels."""
        return DPMSolverMultistepScheduler(
            num_train_timesteps=_TIMES, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0
        )


class Diffusion:
    """Discrete-time diffusion (Ho et al. 2020): z_t = alpha_t z + sigma_t eps, predicting eps or v.

    v = alpha_t eps - sigma_t z (Salimans & Ho 2022). Times are uniform.
    """

    def __init__(self, prediction: str):
        self.prediction = prediction
        self.alphas_cumprod = self.scheduler().alphas_cumprod

    def __call__(self, unet: nn.Module, z: Tensor, y: Tensor | None, eps: Tensor, u: Tensor) -> Tensor:
        """Losses (B,); t = floor(1000 u)."""
        t = (u * _TIMES).long().clamp_max(_TIMES - 1)
        alpha_bar = self.alphas_cumprod[t].to(z.device, non_blocking=True)[:, None, None, None]
        t = t.to(z.device, non_blocking=True)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        target = eps if self.prediction == "epsilon" else alpha * eps - sigma * z
        prediction = unet(alpha * z + sigma * eps, t, class_labels=y).sample
        return (prediction - target).square().flatten(1).mean(1)

    def scheduler(self) -> SchedulerMixin:
        """DPM-Solver++(2M), its steps even in log signal-to-noise: the closest to an exact Gaussian in 18 steps."""
        return DPMSolverMultistepScheduler(
            num_train_timesteps=_TIMES,
            **_BETAS,
            prediction_type="epsilon" if self.prediction == "epsilon" else "v_prediction",
            use_lu_lambdas=True,
        )


OBJECTIVES = {
    "flow": FlowMatching,
    "v": lambda: Diffusion("v"),
    "epsilon": lambda: Diffusion("epsilon"),
}
