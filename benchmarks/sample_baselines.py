"""How others draw: their samplers as stock diffusers has them, in the precision that the networks are in."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, PNDMScheduler, SchedulerMixin
from torch import Tensor, nn

_TRAINED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
# The last step ends at the chain's first noise, and times are counted from 1, as in latent diffusion's own code.
_AS_PUBLISHED = {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
STEPS = {"DDIM-200": 200, "DDIM-50": 50, "PLMS-20": 20}


def ddim(config: Mapping[str, Any]) -> SchedulerMixin:
    """DDIM (Song et al. 2021) with eta 0 for a network that was trained as a scheduler's config says."""
    return DDIMScheduler(**_chain(config), **_AS_PUBLISHED, clip_sample=False)


def plms(config: Mapping[str, Any]) -> SchedulerMixin:
    """Linear multi-steps (Liu et al. 2022) without Runge-Kutta steps, which latent diffusion's code calls PLMS."""
    return PNDMScheduler(**_chain(config), **_AS_PUBLISHED, skip_prk_steps=True)


def stock_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """The scheduler of `DDIM-200`, `DDIM-50` or `PLMS-20` with its steps set."""
    scheduler = (plms if name.startswith("PLMS") else ddim)(config)
    scheduler.set_timesteps(STEPS[name])
    return scheduler


@torch.no_grad()
def draw(
    unet: nn.Module, vae: nn.Module, scheduler: SchedulerMixin, z: Tensor, labels: Tensor | None, guidance: float
) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] of noise z (B, c, h, w); `labels`: ids (B,) and those of no class (B,) in a row.

    Both halves of guidance are one batch, as in latent diffusion's own sampler and in diffusers' pipelines; without
    guidance only the first is asked.
    """
    asked = labels if guidance != 1 or labels is None else labels[: len(z)]
    for t in scheduler.timesteps:
        x = torch.cat([z, z]) if asked is not None and len(asked) > len(z) else z
        eps = unet(scheduler.scale_model_input(x, t), t, class_labels=asked).sample
        if len(x) > len(z):
            strong, weak = eps.chunk(2)
            eps = weak + guidance * (strong - weak)
        z = scheduler.step(eps, t, z).prev_sample
    return vae.decode(z).sample.clamp(-1, 1)


def _chain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in _TRAINED if config.get(name) is not None}
