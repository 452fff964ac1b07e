"""The network of stage 2 as it is trained: a stock UNet, and what stands around it."""

from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from calotype.randomness import numpy_generator

_FREQUENCIES = 64


class Given(NamedTuple):
    """What the network is told beside z_t: class ids (B,), token ids (B, L) and latents of a picture (B, k, h, w)."""

    label: Tensor | None = None
    tokens: Tensor | None = None
    latents: Tensor | None = None


class Prediction(NamedTuple):
    """The network's answer (B, c, h, w), and the log-variance (B,) that it expects of its error, or None."""

    value: Tensor
    log_variance: Tensor | None = None


class Denoiser(nn.Module):
    """A UNet with its text encoder, if any: all that is trained walks through one forward."""

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        text_encoder: nn.Module | None = None,
        uncertainty: nn.Module | None = None,
    ):
        super().__init__()
        self.unet, self.text_encoder, self.uncertainty = unet, text_encoder, uncertainty

    def forward(self, z_t: Tensor, t: Tensor, given: Given) -> Prediction:
        """The prediction for noisy latents z_t (B, c, h, w) at times t (B,)."""
        x = z_t if given.latents is None else torch.cat([z_t, given.latents], dim=1)
        if self.text_encoder is None:
            value = self.unet(x, t, class_labels=given.label).sample
        else:  # padded and unmasked, as stock StableDiffusionPipeline asks
            value = self.unet(x, t, encoder_hidden_states=self.text_encoder(given.tokens)[0]).sample
        return Prediction(value, None if self.uncertainty is None else self.uncertainty(t))


class Uncertainty(nn.Module):
    """A log-variance (B,) as a smooth function of the time: one linear map of Fourier features, 0 at first.

    It is learnt beside the network and thrown away after training (Karras et al. 2024, appendix B.2).
    """

    def __init__(self, seed: int):
        super().__init__()
        draw = numpy_generator(seed, "uncertainty")
        self.register_buffer("frequency", torch.from_numpy(draw.normal(size=_FREQUENCIES)).float() * 8)
        self.register_buffer("phase", torch.from_numpy(draw.random(_FREQUENCIES)).float())
        self.weight = nn.Parameter(torch.zeros(_FREQUENCIES))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, t: Tensor) -> Tensor:
        """Log-variances (B,) at times t (B,) in [0, 1000]."""
        waves = torch.cos(t.float()[:, None] / 1000 * self.frequency + 2 * torch.pi * self.phase)
        return (waves * self.weight).sum(1) + self.bias  # not a matrix product, which autocast would round
