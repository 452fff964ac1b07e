"""Studios of tiny pipelines, and pictures to give them."""

import functools
import io

import numpy as np
import torch
from models import pipeline, tiny_unet, variants
from PIL import Image, ImageChops

from calotype.demo.studio import Studio

EVIL = "<img src=x onerror=alert(1)>"
LABELS = ["disc", "red <b>star</b>", "square"]
COLOURS = {"0": "red", "1": "blue", "2": EVIL}


@functools.cache
def coloured():
    """A studio of three labels, one of them no text for a page."""
    return Studio(pipeline(tiny_unet(classes=3, width=16), id2label=COLOURS))


@functools.cache
def of_each_kind():
    """A studio for each thing that a drawing can be told, by name."""
    return {name: Studio(pipe) for name, pipe in variants().items()}


def photograph(size=(16, 16), mode="RGB"):
    x = np.random.default_rng(3).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(x).resize(size, Image.Resampling.BICUBIC).convert(mode)


def file_of(picture, path):
    picture.save(path)
    return str(path)


def png(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def furthest(a, b):
    return max(high for _, high in ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getextrema())


def tiny_pipeline(labels):
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel

    from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
    )
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        num_class_embeds=len(labels) + 1 if labels else None,
    )
    names = {str(i): label for i, label in enumerate(labels)}
    scheduler = DDIMScheduler(clip_sample=False)
    return LatentDiffusionPipeline(vae, unet, scheduler, id2label=names, default_steps=6, sampler="unipc")
