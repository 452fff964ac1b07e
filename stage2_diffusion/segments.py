"""The way from noise to latents in a few segments, one for each step of a student.

Every path can be walked in the coordinates of the straight one: with u = sigma / (alpha + sigma) the point
y = z_t / (alpha + sigma) = (1 - u) z + u eps moves by dy/du = eps - z, whatever the network predicts. One step of DDIM
is a straight line in them, so the student has to say the mean velocity of a segment (Salimans & Ho 2022 in the terms of
Geng et al. 2025), and the sampler it is saved with walks it exactly.
"""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

from calotype.stage2_diffusion.denoiser import Given
from calotype.stage2_diffusion.objectives import Objective

Velocity = Callable[[Tensor, Tensor], Tensor]  # dy/du (B, c, h, w) at y (B, c, h, w) and u (B,)


class Coordinates:
    """What a network sees and says at a place u (B,) of its path, and what that is in velocities."""

    def __init__(self, objective: Objective):
        self.target = objective.target
        alphas_cumprod = getattr(objective.path, "alphas_cumprod", None)  # none for the flow
        self.table = None if alphas_cumprod is None else _place(((1 - alphas_cumprod) / alphas_cumprod).sqrt()).numpy()

    def time(self, u: Tensor) -> Tensor:
        """The network's time t (B,) in [0, 1000]; between the times it was trained at, interpolated."""
        if self.table is None:
            return 1000 * u
        t = np.interp(u.cpu().numpy(), self.table, np.arange(len(self.table)))
        return torch.from_numpy(t).to(u)

    def scales(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, shaped as u."""
        if self.table is None:
            return 1 - u, u
        norm = ((1 - u) ** 2 + u**2).sqrt()
        return (1 - u) / norm, u / norm

    def velocity(self, net: nn.Module, y: Tensor, u: Tensor, t: Tensor, given: Given) -> Tensor:
        """eps - z (B, c, h, w) as the network has it at y (B, c, h, w); u and t (B,), u above 0."""
        alpha, sigma = self.scales(u[:, None, None, None])
        z_t = (alpha + sigma) * y
        said = net(z_t, t, given).value.float()
        if self.target == "flow":
            return said
        if self.target == "v":
            return (alpha + sigma) * said + (sigma - alpha) * z_t
        if self.target == "epsilon":
            return said - (z_t - sigma * said) / alpha
        return (z_t - alpha * said) / sigma - said


def _place(ratio: Tensor) -> Tensor:
    """u for sigma / alpha."""
    return ratio / (1 + ratio)


class Segments:
    """The steps of a student: where they begin and end, at the student's own times, and its sampler."""

    def __init__(self, objective: Objective, steps: int):
        config = objective.scheduler().config
        grid = {"solver_order": 1, "use_lu_lambdas": False, "timestep_spacing": "trailing"}
        self.scheduler = DPMSolverMultistepScheduler.from_config(config, **grid)
        self.scheduler.set_timesteps(steps)
        sigmas = self.scheduler.sigmas
        self.u = sigmas if config.use_flow_sigmas else _place(sigmas)  # (steps + 1,), down to 0
        self.t = self.scheduler.timesteps  # (steps,)

    def __len__(self) -> int:
        return len(self.t)

    def beginning(self, z: Tensor, eps: Tensor, i: Tensor) -> Tensor:
        """Points y (B, c, h, w) where the segments i (B,) of latents z and noise eps begin; the first is pure noise."""
        u = torch.where(i == 0, 1.0, self.u[i])[:, None, None, None].to(z.device)
        return (1 - u) * z + u * eps

    def mean_velocity(self, velocity: Velocity, y: Tensor, i: Tensor, steps: int) -> Tensor:
        """The mean velocity (B, c, h, w) over the segments i (B,) of the curve through y, in midpoint steps."""
        begin, end = self.u[i].to(y.device), self.u[i + 1].to(y.device)
        h = (end - begin) / steps
        total = torch.zeros_like(y)
        for k in range(steps):
            u, half = begin + k * h, h[:, None, None, None] / 2
            here = y + 2 * half * total
            total += velocity(here + half * velocity(here, u), u + h / 2)
        return total / steps
