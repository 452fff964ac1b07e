"""The autoencoder that is trained: a stock diffusers model and a regulariser in one forward."""

from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from calotype.autoencoder import Vae, downsampling, load_autoencoder
from calotype.errors import UserError
from calotype.randomness import key
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.regularizers import KL, Identity, VectorQuantization

_MULTIPLIERS = (1, 2, 2, 4, 4)  # channels of the levels, in units of the width


class Reconstruction(NamedTuple):
    """What an autoencoder's forward returns."""

    x_hat: Tensor  # (B, C, H, W)
    z: Tensor  # (B, c, h, w)
    penalty: Tensor  # (B,), what the regulariser asks for each example


class Autoencoder(nn.Module):
    """Encoder, regulariser and decoder in one forward, so that wrapping it synchronises every gradient."""

    def __init__(self, vae: Vae, regularizer: nn.Module):
        super().__init__()
        self.vae, self.regularizer = vae, regularizer

    def forward(self, x: Tensor, eps: Tensor) -> Reconstruction:
        """Pictures x (B, C, H, W) in [-1, 1] and noise eps (B, c, h, w) for the posterior."""
        h = self.vae.quant_conv(self.vae.encoder(x)).float()
        z, penalty = self.regularizer(h, eps)
        return Reconstruction(self.vae.decoder(self.vae.post_quant_conv(z)), z, penalty)


def build(settings: VaeSettings, channels: int, size: tuple[int, int]) -> Autoencoder:
    """A fresh autoencoder, or the one that --init names; raises UserError where it does not fit the pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(settings.seed, "init"))
        vae = load_autoencoder(settings.init, "--init") if settings.init else _fresh(settings, channels, size)
    check_fits(vae, channels, size)
    if isinstance(vae, VQModel):
        return Autoencoder(vae, VectorQuantization(vae.quantize.embedding, settings.commitment))
    if settings.regularizer == "none":
        return Autoencoder(vae, Identity())
    return Autoencoder(vae, KL(None if settings.init or settings.learn_variance else settings.posterior_std))


def latent_shape(vae: Vae, size: tuple[int, int]) -> tuple[int, int, int]:
    """Shape (c, h, w) of the latents of pictures of that (height, width)."""
    factor = downsampling(vae)
    channels = vae.config.vq_embed_dim if isinstance(vae, VQModel) else vae.config.latent_channels
    return (channels or vae.config.latent_channels, size[0] // factor, size[1] // factor)


def check_fits(vae: Vae, channels: int, size: tuple[int, int]) -> None:
    """Raise UserError if the autoencoder cannot take pictures of this kind."""
    factor = downsampling(vae)
    if size[0] % factor or size[1] % factor:
        near = "x".join(str(max(factor, side // factor * factor)) for side in size)
        raise UserError(
            f"--image-size {size[0]}x{size[1]} must be a multiple of {factor}, the autoencoder's --factor; try {near}."
        )
    if vae.config.in_channels != channels:
        raise UserError(
            f"the autoencoder takes {vae.config.in_channels} channels and the pictures have {channels}; "
            f"give --channels {vae.config.in_channels} when the data sheet is made."
        )


def _fresh(settings: VaeSettings, channels: int, size: tuple[int, int]) -> Vae:
    levels = settings.factor.bit_length()
    widths = tuple(settings.width * m for m in _MULTIPLIERS[:levels])
    common = dict(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=settings.layers,
        latent_channels=settings.latent_channels,
        norm_num_groups=_groups(settings.width),
        sample_size=max(size),
        mid_block_add_attention=settings.attention,
        scaling_factor=1.0,
        force_upcast=False,
    )
    if settings.regularizer == "vq":
        return VQModel(**common, num_vq_embeddings=settings.codebook, vq_embed_dim=settings.latent_channels)
    return AutoencoderKL(**common)


def _groups(width: int) -> int:
    """Groups of GroupNorm: at most 32, at least two channels each."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if width % groups == 0 and width // groups >= 2)
