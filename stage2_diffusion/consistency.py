"""Consistency: from any point of the teacher's curve straight to its end (Song et al. 2023; Luo et al. 2023).

Every path can be walked in the coordinates of the straight one: with u = sigma / (alpha + sigma) the point
y = z_t / (alpha + sigma) = (1 - u) z + u eps moves by dy/du = eps - z, whatever it is that a network predicts. A
consistent network says the same clean latents z = y - u (eps - z) at all points of a curve, and at u = 0 the point.
"""

import copy

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

from calotype.stage2_diffusion.denoiser import Given
from calotype.stage2_diffusion.objectives import Objective

_FOLLOWS = 0.05  # share of the way to the student at each step that the copy goes
_HUBER = 0.03  # root mean square from which an error counts by itself, no longer by its square


class Coordinates:
    """What a network sees and says at a place u (B,) of its path, and what that is as a velocity."""

    def __init__(self, objective: Objective):
        self.target = objective.target
        alphas_cumprod = getattr(objective.path, "alphas_cumprod", None)  # none for the flow
        self.table = None if alphas_cumprod is None else place(((1 - alphas_cumprod) / alphas_cumprod).sqrt()).numpy()

    def time(self, u: Tensor) -> Tensor:
        """The network's time t (B,) in [0, 1000]; between the times that it was trained at, interpolated."""
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


def place(ratio: Tensor) -> Tensor:
    """u for sigma / alpha."""
    return ratio / (1 + ratio)


def few_step_sampler(objective: Objective) -> DPMSolverMultistepScheduler:
    """The first-order stochastic solver of the objective's own path, for any number of steps.

    A step goes to the clean latents that the student names and part of the way back with new noise: all of it after the
    first step, less the shorter the steps are, so that four steps lose less of what they have than from scratch.
    """
    config = objective.path.trained(objective.target).config
    grid = {"use_lu_lambdas": False, "timestep_spacing": "trailing"}
    return DPMSolverMultistepScheduler.from_config(config, solver_order=1, algorithm_type="sde-dpmsolver++", **grid)


class Consistency:
    """The error of a student between neighbours on a grid of the sampler's own times, from pure noise to u = 0."""

    def __init__(self, objective: Objective, steps: int):
        self.coordinates, scheduler = Coordinates(objective), few_step_sampler(objective)
        scheduler.set_timesteps(steps)
        self.t = scheduler.timesteps  # (steps,), as the sampler rounds them
        self.u = scheduler.sigmas if scheduler.config.use_flow_sigmas else place(scheduler.sigmas)  # (steps + 1,)

    def __len__(self) -> int:
        return len(self.t)

    def point(self, z: Tensor, eps: Tensor, i: Tensor) -> Tensor:
        """y (B, c, h, w) at the places i (B,) of the grid, of latents z and noise eps; at 0 it is noise alone."""
        alpha, sigma = (s[:, None, None, None].to(z.device) for s in self.coordinates.scales(self.u[i]))
        first = (i == 0)[:, None, None, None].to(z.device)
        return torch.where(first, eps, alpha * z + sigma * eps) / (alpha + sigma)

    def clean(self, net: nn.Module, y: Tensor, i: Tensor, given: Given) -> Tensor:
        """The clean latents (B, c, h, w) that a student names at y; at the end of the grid y itself."""
        inside = i.clamp_max(len(self) - 1)
        u, t = self.u[inside].to(y.device), self.t[inside].to(y.device)
        z = y - u[:, None, None, None] * self.coordinates.velocity(net, y, u, t, given)
        return torch.where((i < len(self))[:, None, None, None].to(y.device), z, y)

    @torch.no_grad()
    def target(self, student: nn.Module, teacher: nn.Module, y: Tensor, i: Tensor, given: Given) -> Tensor:
        """What the student says (B, c, h, w) where the teacher's step from y leads, at the places i + 1."""
        u, then = self.u[i].to(y.device), self.u[i + 1].to(y.device)
        velocity = self.coordinates.velocity(teacher, y, u, self.coordinates.time(u), given)
        return self.clean(student, y + (then - u)[:, None, None, None] * velocity, i + 1, given)


class SlowCopy:
    """A copy of a network that follows it; what a student is compared with must not run away from it."""

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Go a twentieth of the way to the weights of `model`."""
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), _FOLLOWS)


def pseudo_huber(z_hat: Tensor, z: Tensor) -> Tensor:
    """A loss (B,) between the squared and the absolute error (Song & Dhariwal 2024, eq. 7)."""
    mean = (z_hat - z).square().flatten(1).mean(1)
    return (mean + _HUBER**2).sqrt() - _HUBER
