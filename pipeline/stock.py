"""`calotype export --stock`: a layout that diffusers loads with no flag, of its own pipelines and parts alone.

condition   pipeline                    its call
none        LDMPipeline                 pipe(batch_size, num_inference_steps=…)
class       DiTPipeline                 pipe(class_labels=pipe.get_label_ids(["red star"]), guidance_scale=…)
text        StableDiffusionPipeline     pipe("a prompt", guidance_scale=…)
"""

import copy

import torch
from diffusers import DiffusionPipeline, DiTPipeline, LDMPipeline, StableDiffusionPipeline, UNet2DModel

from calotype.errors import UserError
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline

_NULL = 1000  # DiTPipeline's class id of no class


def stock(pipe: LatentDiffusionPipeline) -> DiffusionPipeline:
    """The same model as one of diffusers' own pipelines; raises UserError where it has none for it."""
    _refuse_what_has_no_home(pipe)
    if pipe.condition == "text":
        return StableDiffusionPipeline(
            vae=pipe.vae, unet=pipe.unet, scheduler=pipe.scheduler, text_encoder=pipe.text_encoder,
            tokenizer=pipe.tokenizer, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    if not pipe.labels:
        return LDMPipeline(vqvae=pipe.vae, unet=pipe.unet, scheduler=pipe.scheduler)
    found = DiTPipeline(transformer=_with_null_at_the_end(pipe.unet), vae=pipe.vae, scheduler=pipe.scheduler)
    found.register_to_config(id2label=dict(pipe.config.id2label))
    return found


def _refuse_what_has_no_home(pipe: LatentDiffusionPipeline) -> None:
    height, width = pipe.latent_shape[1:]
    reason = None
    if pipe.takes_image:
        reason = f"diffusers has no pipeline for latents beside those of a given picture ({pipe.condition})"
    elif height != width and pipe.condition != "text":
        reason = f"diffusers' pipelines draw squares, and latents here are {height}x{width}"
    elif pipe.image_size[0] < pipe.factor:
        reason = f"its pictures of {pipe.image_size[0]} pixels are cropped from {pipe.factor}, and diffusers crops none"
    elif len(pipe.labels) > _NULL:
        reason = f"DiTPipeline knows {_NULL} classes, and here are {len(pipe.labels)}"
    if reason:
        raise UserError(f"--stock: {reason}; leave it out, the model loads with trust_remote_code=True.")


def _with_null_at_the_end(unet: UNet2DModel) -> UNet2DModel:
    """The same network with its null class where DiTPipeline looks for it; rows between are never asked for."""
    found = copy.deepcopy(unet)
    weight = found.class_embedding.weight.data
    table = torch.nn.Embedding(_NULL + 1, weight.shape[1], device=weight.device, dtype=weight.dtype)
    table.weight.data.zero_()
    table.weight.data[: len(weight) - 1], table.weight.data[_NULL] = weight[:-1], weight[-1]
    found.class_embedding = table
    found.register_to_config(num_class_embeds=_NULL + 1)
    return found.eval()
