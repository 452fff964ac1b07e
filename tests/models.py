"""Tiny pipelines with random weights, one for each thing that a drawing can be told."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.samplers import make_scheduler

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
CAPTIONS = ["a red star on a table", "a blue disc", "two green squares in the rain", "a tall yellow house by the sea"]


def tiny_vae(kind=AutoencoderKL, channels=3):
    torch.manual_seed(0)
    return kind(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.0,
    )


def tiny_unet(in_channels=4, classes=0, seed=1, width=8):
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(width, 2 * width),
        norm_num_groups=4,
        layers_per_block=1,
        num_class_embeds=classes + 1 if classes else None,
    )


def text_unet(seed=1):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def text_parts():
    """A CLIP text encoder of random weights, and a tokenizer that knows the captions."""
    from calotype.stage2_diffusion import text

    tokenizer = text.train_tokenizer(CAPTIONS)
    return {"text_encoder": text.build_encoder(tokenizer, 16, 2, seed=2), "tokenizer": tokenizer}


def pipeline(unet, vae=None, sampler="unipc", **parts):
    """A pipeline of a flow that says nothing while it draws."""
    pipe = LatentDiffusionPipeline(vae or tiny_vae(), unet, make_scheduler(FLOW, sampler), default_steps=3, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def variants():
    """A pipeline of each kind by name."""
    colours = {"id2label": {"0": "red", "1": "blue"}}
    torch.manual_seed(3)
    blocks = {f"{half}_block_out_channels": (8, 8) for half in ("encoder", "decoder")}
    tiny = AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    return {
        "none": pipeline(tiny_unet()),
        "class": pipeline(tiny_unet(classes=2), **colours),
        "text": pipeline(text_unet(), **text_parts()),
        "inpaint": pipeline(tiny_unet(9), condition="inpaint"),
        "superres": pipeline(tiny_unet(8, classes=2), condition="superres:4", **colours),
        "edges": pipeline(tiny_unet(8), condition="edges"),
        "guide": pipeline(tiny_unet(), guide=tiny_unet(seed=5), default_guidance=2.0),
        "fast": pipeline(
            tiny_unet(classes=2),
            student=tiny_unet(classes=2, seed=6),
            student_scheduler=FlowMatchEulerDiscreteScheduler(),
            tiny_decoder=tiny,
            student_steps=2,
            **colours,
        ),
        "vq": pipeline(tiny_unet(), tiny_vae(VQModel)),
    }
