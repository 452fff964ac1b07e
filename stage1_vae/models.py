"""The autoencoder that is trained: a stock diffusers model and a regulariser in one forward."""

import math
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from calotype.autoencoder import Vae, crop, downsampling, load_autoencoder, pad
from calotype.errors import UserError
from calotype.likelihoods import Likelihood
from calotype.randomness import key
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.regularizers import KL, FiniteScalar, Identity, Terms, VectorQuantization

_MULTIPLIERS = (1, 2, 2, 4, 4)  # channels of the levels, in units of the width


class Reconstruction(NamedTuple):
    """What an autoencoder's forward returns."""

    x_hat: Tensor  # (B, C, H, W)
    z: Tensor  # (B, c, h, w)
    terms: Terms  # (B,) each: what the regulariser asks for each example
    log_scale: Tensor | None  # of the likelihood, where one is learnt


class Autoencoder(nn.Module):
    """Encoder, regulariser and decoder in one forward, so that wrapping it synchronises every gradient."""

    def __init__(self, vae: Vae, regularizer: nn.Module, likelihood: Likelihood | None = None):
        super().__init__()
        self.vae, self.regularizer, self.likelihood = vae, regularizer, likelihood
        self.factor = downsampling(vae)

    def forward(self, x: Tensor, eps: Tensor) -> Reconstruction:
        """Pictures x (B, C, H, W) in [-1, 1] and noise eps (B, c, h, w) for the posterior."""
        z, terms = self.regularizer(self.encode(x), eps)
        scale = self.likelihood.log_scale if self.likelihood else None
        return Reconstruction(self.decode(z, tuple(x.shape[2:])), z, terms, scale)

    def encode(self, x: Tensor) -> Tensor:
        """What the regulariser takes: mean and log-variance (B, 2c, h, w), or unquantised latents (B, c, h, w)."""
        return self.vae.quant_conv(self.vae.encoder(pad(x, self.factor))).float()

    def decode(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        """Pictures (B, C, *size) of latents (B, c, h, w)."""
        return crop(self.vae.decoder(self.vae.post_quant_conv(z)), size)


def build(settings: VaeSettings, channels: int, size: tuple[int, int]) -> Autoencoder:
    """A fresh autoencoder, or the one that --init names; raises UserError where it does not fit the pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(settings.seed, "init"))
        vae = load_autoencoder(settings.init, "--init") if settings.init else _fresh(settings, channels, size)
    _refuse_other_law(settings, vae)
    check_fits(vae, channels, size)
    likelihood = Likelihood(settings.likelihood_kind, settings.likelihood_scale) if settings.bound else None
    return Autoencoder(vae, _regularizer(settings, vae), likelihood)


def _refuse_other_law(settings: VaeSettings, vae: Vae) -> None:
    """Raise UserError where a codebook is asked of an autoencoder that has none, or levels of one that is there."""
    kind, has = settings.regularizer, type(vae).__name__
    if settings.init and (kind == "fsq" or (kind == "vq" and not isinstance(vae, VQModel))):
        raise UserError(
            f"--regularizer {kind}: --init {settings.init} holds an {has} with a latent of its own; leave one of them "
            "out."
        )


def _regularizer(settings: VaeSettings, vae: Vae) -> nn.Module:
    if settings.regularizer == "fsq" and not settings.init:
        return FiniteScalar(vae.quantize.embedding, settings.fsq_levels)
    if isinstance(vae, VQModel):
        return VectorQuantization(vae.quantize.embedding)
    if settings.regularizer == "none":
        return Identity()
    std = None if settings.init else settings.fixed_posterior_std
    return KL(std, settings.free_bits, settings.free_bits_per_sample)


def latent_shape(vae: Vae, size: tuple[int, int]) -> tuple[int, int, int]:
    """Shape (c, h, w) of the latents of pictures of that (height, width)."""
    factor = downsampling(vae)
    channels = vae.config.vq_embed_dim if isinstance(vae, VQModel) else vae.config.latent_channels
    return (channels or vae.config.latent_channels, max(size[0] // factor, 1), max(size[1] // factor, 1))


def check_fits(vae: Vae, channels: int, size: tuple[int, int]) -> None:
    """Raise UserError if the autoencoder cannot take pictures of this kind."""
    factor = downsampling(vae)
    if (size[0] % factor or size[1] % factor) and not _one_code(vae, size):
        near = "x".join(str(max(factor, side // factor * factor)) for side in size)
        raise UserError(
            f"--image-size {size[0]}x{size[1]} must be a multiple of {factor}, the autoencoder's --factor; try {near}."
        )
    if vae.config.in_channels != channels:
        raise UserError(
            f"the autoencoder takes {vae.config.in_channels} channels and the pictures have {channels}; "
            f"give --channels {vae.config.in_channels} when the data sheet is made."
        )


def _one_code(vae: Vae, size: tuple[int, int]) -> bool:
    """Whether the autoencoder was made to squeeze whole pictures of this size, with a border, into a 1x1 latent."""
    return max(size) == vae.config.sample_size and max(size) <= downsampling(vae) < 2 * max(size)


def _fresh(settings: VaeSettings, channels: int, size: tuple[int, int]) -> Vae:
    factor, latent_channels = _bottleneck(settings, size)
    levels = factor.bit_length()
    widths = tuple(settings.width * m for m in (*_MULTIPLIERS, *[_MULTIPLIERS[-1]] * levels)[:levels])
    common = dict(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=settings.layers,
        latent_channels=latent_channels,
        norm_num_groups=_groups(settings.width),
        sample_size=max(size),
        mid_block_add_attention=settings.attention,
        scaling_factor=1.0,
        force_upcast=False,
    )
    if settings.regularizer in ("vq", "fsq"):
        codes = settings.codebook if settings.regularizer == "vq" else math.prod(settings.fsq_levels)
        return VQModel(**common, num_vq_embeddings=codes, vq_embed_dim=latent_channels)
    return AutoencoderKL(**common)


def _bottleneck(settings: VaeSettings, size: tuple[int, int]) -> tuple[int, int]:
    """How far the sides shrink, and the channels of the latent; a code of 1x1 takes the next power of two."""
    if settings.latent_dim is None:
        levels = settings.fsq_levels
        return settings.factor, len(levels) if settings.regularizer == "fsq" else settings.latent_channels
    if size[0] != size[1]:
        raise UserError(
            f"--latent-dim {settings.latent_dim} needs square pictures, not {size[0]}x{size[1]}; make the data sheet "
            f"with --image-size {max(size)} --fit pad."
        )
    return 1 << (size[0] - 1).bit_length(), settings.latent_dim


def _groups(width: int) -> int:
    """Groups of GroupNorm: at most 32, at least two channels each."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if width % groups == 0 and width // groups >= 2)
