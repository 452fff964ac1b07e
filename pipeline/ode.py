"""The probability-flow ODE of a trained network (Song et al. 2021), in a variable in which neither end is singular.

    flow        z = (1 - s) z_0 + s eps                     dz/ds = v = eps - z_0
    diffusion   z = cos(phi) z_0 + sin(phi) eps             dz/dphi = v = cos(phi) eps - sin(phi) z_0

with phi = phi_0 + s (phi_1 - phi_0), and s from 0, the picture, to 1, noise.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from calotype.pipeline.samplers import TIMES, is_flow

_LEAST_COSINE = 1e-3  # where noise has no trace of the picture an eps-network says nothing about it


class Path(Protocol):
    """How clean latents turn into noise, as a curve in s from 0 to 1."""

    def time(self, s: float) -> float:
        """The network's time from 0 to 1000."""

    def slope(self, z: Tensor, prediction: Tensor, s: float) -> Tensor:
        """dz/ds (B, c, h, w), of what the network says of z."""


class Flow:
    """The straight path."""

    def time(self, s: float) -> float:
        """The network's time from 0 to 1000."""
        return TIMES * s

    def slope(self, z: Tensor, prediction: Tensor, s: float) -> Tensor:
        """dz/ds (B, c, h, w), of what the network says of z."""
        return prediction


class VariancePreserving:
    """The path of a chain with betas, even in the angle."""

    def __init__(self, config: Mapping[str, Any]):
        kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        chain = {name: config[name] for name in kept if name in config}
        zero_snr = bool(config.get("rescale_betas_zero_snr"))
        alphas_cumprod = DPMSolverMultistepScheduler(**chain, rescale_betas_zero_snr=zero_snr).alphas_cumprod
        self.angles = alphas_cumprod.double().sqrt().arccos().numpy()
        self.kind = config.get("prediction_type", "epsilon")

    def time(self, s: float) -> float:
        """The network's time, between the whole ones that it was trained at."""
        return float(np.interp(self._angle(s), self.angles, np.arange(len(self.angles))))

    def slope(self, z: Tensor, prediction: Tensor, s: float) -> Tensor:
        """dz/ds (B, c, h, w), of what the network says of z."""
        cosine, sine = max(math.cos(self._angle(s)), _LEAST_COSINE), math.sin(self._angle(s))
        if self.kind == "epsilon":
            v = (prediction - sine * z) / cosine
        elif self.kind == "sample":
            v = (cosine * z - prediction) / sine
        else:
            v = prediction
        return (self.angles[-1] - self.angles[0]) * v

    def _angle(self, s: float) -> float:
        return self.angles[0] + s * (self.angles[-1] - self.angles[0])


def path_of(config: Mapping[str, Any]) -> Path:
    """The path that the network with this saved scheduler was trained on."""
    return Flow() if is_flow(config) else VariancePreserving(config)


def follow(slope: Callable[[Tensor, float], Tensor], z: Tensor, begin: float, end: float, steps: int) -> Tensor:
    """z carried along dz/ds = slope(z, s) from `begin` to `end` in equal steps of Heun's method."""
    h = (end - begin) / steps
    for i in range(steps):
        s = begin + i * h
        here = slope(z, s)
        z = z + h / 2 * (here + slope(z + h * here, s + h))
    return z
