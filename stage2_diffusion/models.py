"""The UNet of stage 2: a stock `UNet2DModel` of the latents' shape."""

import math
from pathlib import Path

import torch
from diffusers import UNet2DModel

from calotype.errors import UserError
from calotype.randomness import key
from calotype.stage2_diffusion.config import DiffusionSettings

_MULTIPLIERS = (1, 2, 2, 4, 4)  # channels of the levels, in units of the width


def build(settings: DiffusionSettings, shape: tuple[int, int, int], classes: int) -> UNet2DModel:
    """A UNet for latents of shape (c, h, w); class id `classes` is the null class. `classes` 0: unconditional."""
    if settings.init:
        return _load(settings.init, shape, classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(settings.seed, "init"))
        return UNet2DModel(**_config(settings, shape, classes))


def _config(settings: DiffusionSettings, shape: tuple[int, int, int], classes: int) -> dict:
    depth = _depth(settings, shape)
    attention = [settings.attention and level > 0 for level in range(depth)]
    widths = tuple(settings.width * m for m in _MULTIPLIERS[:depth])
    return dict(
        sample_size=_sample_size(shape),
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=widths,
        layers_per_block=settings.layers,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        norm_num_groups=next(groups for groups in (32, 16, 8, 4, 2, 1) if settings.width % groups == 0),
        attention_head_dim=min(64, settings.width),
        add_attention=settings.attention,
        num_class_embeds=classes + 1 if classes else None,
    )


def _depth(settings: DiffusionSettings, shape: tuple[int, int, int]) -> int:
    """As many levels as were asked for and as both sides can be halved."""
    side = math.gcd(*shape[1:])
    return min(settings.depth, (side & -side).bit_length())


def _load(run: Path, shape: tuple[int, int, int], classes: int) -> UNet2DModel:
    folder = next(
        (f for f in (run, run / "unet", run / "stage2_diffusion" / "unet") if (f / "config.json").is_file()), run
    )
    try:
        unet = UNet2DModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except OSError as error:
        raise UserError(f"--init {run} holds no UNet ({str(error).splitlines()[0]}).") from None
    has = (unet.config.in_channels, (unet.config.num_class_embeds or 1) - 1)
    if has != (shape[0], classes):
        raise UserError(
            f"--init {run} is for {has[0]} latent channels and {has[1]} classes, the cache has {shape[0]} and "
            f"{classes}; give the UNet of a run on such latents."
        )
    divisor = 2 ** (len(unet.config.block_out_channels) - 1)
    if shape[1] % divisor or shape[2] % divisor:
        raise UserError(f"--init {run}: its levels do not divide latents of {shape[1]}x{shape[2]}; give another UNet.")
    unet.register_to_config(sample_size=_sample_size(shape))
    return unet


def _sample_size(shape: tuple[int, int, int]) -> int | list[int]:
    return shape[1] if shape[1] == shape[2] else list(shape[1:])
