"""The latent-variable model p(x|z) p(z) that a saved KL autoencoder stands for, from the facts beside it."""

import math
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.distributions import Normal

from calotype.autoencoder import Facts, Vae
from calotype.bounds import Model
from calotype.errors import UserError
from calotype.likelihoods import KINDS


def prior_of(vae: Vae, facts: Facts) -> Normal:
    """p(z) of training with mean and deviation (c, 1, 1); N(0, I) where the facts do not name one."""
    channels = vae.config.latent_channels
    mean, std = facts.prior_mean or [0.0] * channels, facts.prior_std or [1.0] * channels
    return Normal(*(torch.tensor(values, device=vae.device)[:, None, None] for values in (mean, std)))


def model_of(
    vae: Vae, facts: Facts, posterior: Callable[[Tensor], Normal], decode: Callable[[Tensor, tuple[int, int]], Tensor]
) -> Model:
    """The model whose likelihood the facts name, of q(z|x) and of decoded pictures (B, C, *size) in [-1, 1]."""
    nats, log_scale = KINDS[facts.likelihood], torch.tensor(math.log(facts.scale or 1.0))

    def log_likelihood(z: Tensor, x: Tensor) -> Tensor:
        return -nats(decode(z, tuple(x.shape[2:])), x, log_scale.to(x.device))

    return Model(posterior, prior_of(vae, facts), log_likelihood)


def refuse_odd_facts(name: str, vae: Vae, facts: Facts) -> None:
    """Raise UserError that begins with `name` if the facts cannot be those of this autoencoder."""
    prior = [facts.prior_mean or [], facts.prior_std or []]
    fits = isinstance(vae, AutoencoderKL) and all(len(part) == vae.config.latent_channels for part in prior)
    if facts.likelihood not in KINDS or not fits:
        raise UserError(
            f"{name}: its calotype.json (likelihood {facts.likelihood}) does not belong to this autoencoder; "
            "export the autoencoder again, or delete that file."
        )
