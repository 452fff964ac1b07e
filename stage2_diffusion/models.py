"""The UNet of stage 2: a stock `UNet2DModel` of the latents' shape, or `UNet2DConditionModel` led by captions."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D

from calotype.errors import UserError
from calotype.randomness import key
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.weights import load_network, read_json

UNet = UNet2DModel | UNet2DConditionModel

_MULTIPLIERS = (1, 2, 2, 4, 4)  # channels of the levels, in units of the width
_HEAD = 32  # channels of a head of cross-attention


class Inputs(NamedTuple):
    """What a UNet must take: latents of shape (c, h, w), more channels beside them, classes or a text's width."""

    shape: tuple[int, int, int]
    more_channels: int = 0
    classes: int = 0
    text_width: int = 0


def build(settings: DiffusionSettings, inputs: Inputs) -> UNet:
    """A UNet for these inputs, new or that of `--init`; class id `classes` is the null class."""
    if settings.init:
        unet = _load(settings.init, inputs)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(settings.seed, "init"))
            unet = _text_unet(settings, inputs) if inputs.text_width else UNet2DModel(**_config(settings, inputs))
        _begin_with_nothing(unet)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def _begin_with_nothing(unet: UNet) -> None:
    """Each residual block begins as the identity and the whole as 0 (Ho et al. 2020; Dhariwal & Nichol 2021)."""
    last = [block.conv2 for block in unet.modules() if isinstance(block, ResnetBlock2D)]
    for layer in (*last, unet.conv_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


def _common(settings: DiffusionSettings, inputs: Inputs) -> dict:
    return dict(
        sample_size=_sample_size(inputs.shape),
        in_channels=inputs.shape[0] + inputs.more_channels,
        out_channels=inputs.shape[0],
        block_out_channels=tuple(settings.width * m for m in _MULTIPLIERS[: _depth(settings, inputs.shape)]),
        layers_per_block=settings.layers,
        norm_num_groups=next(groups for groups in (32, 16, 8, 4, 2, 1) if settings.width % groups == 0),
    )


def _config(settings: DiffusionSettings, inputs: Inputs) -> dict:
    common = _common(settings, inputs)
    attention = [settings.attention and level > 0 for level in range(len(common["block_out_channels"]))]
    return common | dict(
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        attention_head_dim=min(64, settings.width),
        add_attention=settings.attention,
        resnet_time_scale_shift="scale_shift",  # time and class scale each layer's activations (Dhariwal & Nichol 2021)
        num_class_embeds=inputs.classes + 1 if inputs.classes else None,
    )


def _text_unet(settings: DiffusionSettings, inputs: Inputs) -> UNet2DConditionModel:
    """Cross-attention below the first level and in the middle; the whole caption, pooled, speaks to every layer too.

    It is added to the layers, not a factor of them as in the other UNet: with factors it never learnt where things are.
    """
    common = _common(settings, inputs)
    widths = common["block_out_channels"]
    attention = [level > 0 for level in range(len(widths))]
    return UNet2DConditionModel(
        **common,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        attention_head_dim=tuple(max(1, width // _HEAD) for width in widths),  # a number of heads, despite its name
        cross_attention_dim=inputs.text_width,
        addition_embed_type="text",
        addition_embed_type_num_heads=math.gcd(4, inputs.text_width),
    )


def _depth(settings: DiffusionSettings, shape: tuple[int, int, int]) -> int:
    """As many levels as were asked for and as both sides can be halved."""
    side = math.gcd(*shape[1:])
    return min(settings.depth, (side & -side).bit_length())


def _load(run: Path, inputs: Inputs) -> UNet:
    folder = next(
        (f for f in (run / "unet", run / "stage2_diffusion" / "unet", run) if (f / "config.json").is_file()), run
    )
    unet = load_unet(folder, f"--init {run}")
    config = unet.config
    has = Inputs(
        (config.out_channels, *inputs.shape[1:]),
        config.in_channels - config.out_channels,
        max((config.num_class_embeds or 1) - 1, 0),
        config.get("cross_attention_dim") or 0,
    )
    if has != inputs:
        raise UserError(
            f"--init {run} takes {_described(has)}, the cache and the condition give {_described(inputs)}; give the "
            "UNet of a run on such latents."
        )
    divisor = 2 ** (len(config.block_out_channels) - 1)
    height, width = inputs.shape[1:]
    if height % divisor or width % divisor:
        raise UserError(f"--init {run}: its levels do not divide latents of {height}x{width}; give another UNet.")
    unet.register_to_config(sample_size=_sample_size(inputs.shape))
    return unet


def load_unet(folder: Path, name: str) -> UNet:
    """The UNet saved in a folder, of whichever class; raises UserError that begins with `name`."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} holds no UNet (no config.json in {folder}); give another folder.")
    kind = read_json(folder / "config.json", name).get("_class_name")
    return load_network(UNet2DConditionModel if kind == "UNet2DConditionModel" else UNet2DModel, folder, name)


def _described(inputs: Inputs) -> str:
    text = f", text of width {inputs.text_width}" if inputs.text_width else f" and {inputs.classes} classes"
    more = f" + {inputs.more_channels}" if inputs.more_channels else ""
    return f"{inputs.shape[0]}{more} latent channels{text}"


def _sample_size(shape: tuple[int, int, int]) -> int | list[int]:
    return shape[1] if shape[1] == shape[2] else list(shape[1:])
