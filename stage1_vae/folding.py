"""Latent statistics folded into the weights, so that a saved autoencoder gives latents of unit variance by itself."""

from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from calotype.autoencoder import Vae


class Statistics(NamedTuple):
    """Mean (c,) and standard deviation (c,) of the latents, as they are sampled."""

    mean: Tensor
    std: Tensor


class RunningStatistics:
    """Mean and standard deviation over batches of latents, in double precision."""

    def __init__(self):
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, mean: Tensor, variance: Tensor | float = 0.0) -> None:
        """Take in posterior means (B, c, h, w) and their variances."""
        mean = mean.cpu().double()  # some devices know no double precision
        self.count += mean.numel() // mean.shape[1]
        self.sum = self.sum + mean.sum((0, 2, 3))
        self.squares = self.squares + (mean**2 + variance).sum((0, 2, 3))

    def result(self) -> Statistics:
        """The statistics over everything that was added."""
        mean = self.sum / self.count
        return Statistics(mean, (self.squares / self.count - mean**2).clamp_min(1e-12).sqrt())


@torch.no_grad()
def fix_variance(vae: AutoencoderKL, log_variance: float) -> None:
    """Let the saved encoder report this log-variance everywhere: weight 0, bias `log_variance`."""
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = log_variance


@torch.no_grad()
def fold(vae: Vae, statistics: Statistics) -> None:
    """Make the latents zero-mean and unit-variance without changing what is decoded (exact but for rounding).

    Each channel of a KL latent has its own scale. A codebook lookup compares distances, so VQ has one scale for all
    channels and a shift for each; the code vectors move along.
    """
    if isinstance(vae, VQModel):
        _fold_vq(vae, statistics)
    else:
        _fold_kl(vae, statistics)
    vae.register_to_config(scaling_factor=1.0)
    if "shift_factor" in vae.config:
        vae.register_to_config(shift_factor=None, latents_mean=None, latents_std=None)


def ensure_quant_convs(vae: AutoencoderKL) -> None:
    """Give an autoencoder that was built without 1x1 quant convolutions a pair that changes nothing."""
    if vae.config.get("use_quant_conv", True) and vae.config.get("use_post_quant_conv", True):
        return
    vae.quant_conv = vae.quant_conv or _identity(2 * vae.config.latent_channels)
    vae.post_quant_conv = vae.post_quant_conv or _identity(vae.config.latent_channels)
    vae.register_to_config(use_quant_conv=True, use_post_quant_conv=True)


def _fold_kl(vae: AutoencoderKL, statistics: Statistics) -> None:
    m, s = (value.to(vae.quant_conv.weight) for value in statistics)
    c = len(m)
    vae.quant_conv.weight[:c] /= s[:, None, None, None]
    vae.quant_conv.bias[:c] = (vae.quant_conv.bias[:c] - m) / s
    vae.quant_conv.bias[c:] -= 2 * s.log()
    _unfold_decoder(vae.post_quant_conv, m, s)


def _fold_vq(vae: VQModel, statistics: Statistics) -> None:
    m = statistics.mean.to(vae.quant_conv.weight)
    s = statistics.std.square().mean().sqrt().to(m)
    vae.quant_conv.weight /= s
    vae.quant_conv.bias.copy_((vae.quant_conv.bias - m) / s)
    vae.quantize.embedding.weight.copy_((vae.quantize.embedding.weight - m) / s)
    _unfold_decoder(vae.post_quant_conv, m, s.expand_as(m))


def _unfold_decoder(conv: nn.Conv2d, m: Tensor, s: Tensor) -> None:
    conv.bias += conv.weight[:, :, 0, 0] @ m
    conv.weight *= s[None, :, None, None]


def _identity(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, 1)
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv
