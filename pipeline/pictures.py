"""Pictures as tensors and latents, and what a model that begins with a picture is given of it.

This file travels inside every saved model beside `pipeline.py`, so it imports nothing but torch, diffusers, numpy, PIL.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from diffusers.utils import numpy_to_pil
from PIL import Image
from torch import Tensor

Vae = AutoencoderKL | VQModel


def degrade(kind: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a model conditioned on pictures is given in place of x: both (B, C, H, W) in [-1, 1].

    "superres:N": the means over NxN pixels, enlarged again; "edges": Sobel's gradient, the strongest edge of each
    picture white on black; "inpaint": mid grey where `mask` (B, 1, H, W) is 1.
    """
    if kind == "edges":
        return _edges(x)
    if kind == "inpaint":
        return x * (mask < 0.5)
    factor = int(kind.partition(":")[2])
    return enlarge(shrink(x, factor), tuple(x.shape[2:]))


def shrink(x: Tensor, factor: int) -> Tensor:
    """Means (B, C, H // factor, W // factor) of pictures (B, C, H, W)."""
    return F.interpolate(x, (x.shape[2] // factor, x.shape[3] // factor), mode="area")


def given_latents(vae: Vae, kind: str, x_given: Tensor, mask: Tensor | None = None) -> Tensor:
    """The channels (B, c, h, w) beside z that stand for given pictures (B, C, H, W) in [-1, 1]: their posterior's mean.

    For "inpaint" the mask (B, 1, H, W), 1 where something new is to be, follows as the last channel (c + 1); an element
    of the latents counts as new if any of its pixels does.
    """
    if kind != "inpaint":
        return encode(vae, x_given)
    z = encode(vae, degrade(kind, x_given, mask))
    return torch.cat([z, F.adaptive_max_pool2d(mask.to(z), z.shape[2:])], dim=1)


def encode(vae: Vae, x: Tensor) -> Tensor:
    """Latents (B, c, h, w) of pictures (B, C, H, W) in [-1, 1]: the posterior's mean, or the code before quantising."""
    encoded = vae.encode(_pad(x, 2 ** (len(vae.config.block_out_channels) - 1)).to(vae.device, vae.dtype))
    return encoded.latents if isinstance(vae, VQModel) else encoded.latent_dist.mean


def fill_hole(x: Tensor, new: Tensor) -> Tensor:
    """Pictures (B, C, H, W) with what is new (B, 1, H, W) filled by the mean of the nearest that is known.

    So an encoder that sees both sides of the edge is told nothing of what was there, and of no step that is none.
    """
    known = 1 - new
    filled, seen = x * known, known
    for radius in (1, 3, 7, 15, 31, 63, 127):
        total = F.avg_pool2d(x * known, 2 * radius + 1, 1, radius, count_include_pad=False)
        share = F.avg_pool2d(known, 2 * radius + 1, 1, radius, count_include_pad=False)
        first = (seen == 0) & (share > 0)
        filled = torch.where(first, total / share.clamp_min(1e-6), filled)
        seen = torch.maximum(seen, first.to(seen))
    return filled


def new_latents(new: Tensor, size: tuple[int, int]) -> Tensor:
    """1 where latents (B, 1, h, w) become new: where their share of new pixels is at least half the largest nearby.

    In a hole that is half of the pixels; a stroke thinner than a latent's patch counts too.
    """
    share = F.adaptive_avg_pool2d(new, size)
    return ((share > 0) & (share >= F.max_pool2d(share, 3, 1, 1) / 2)).to(new)


def edges_of(image: Image.Image) -> Image.Image:
    """The edge picture of a photograph, as a model with the condition "edges" is given it; same size and mode."""
    image = image if image.mode == "L" else image.convert("RGB")
    x = degrade("edges", to_tensor([image])) / 2 + 0.5
    return numpy_to_pil(x.permute(0, 2, 3, 1).numpy())[0]


def _edges(x: Tensor) -> Tensor:
    """Sobel's gradient of the mean over channels, each picture scaled by its largest one; flat pictures stay black."""
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    sobel = grey.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    dx, dy = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None]).chunk(2, dim=1)
    size = (dx**2 + dy**2).sqrt()
    return (size / size.amax((2, 3), keepdim=True).clamp_min(0.05) * 2 - 1).expand_as(x)


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] at a larger size (height, width), bicubic."""
    return F.interpolate(x, size, mode="bicubic", align_corners=False).clamp(-1, 1)


def _pad(x: Tensor, factor: int) -> Tensor:
    """Pictures smaller than the patch of a 1x1 latent, grown to it by repeating their edges."""
    margin = max(factor - min(x.shape[2:]), 0)
    before, after = margin // 2, margin - margin // 2
    return F.pad(x, (before, after, before, after), mode="replicate") if margin else x


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1]."""
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    x = torch.from_numpy(pixels.reshape(len(images), images[0].height, images[0].width, -1))
    return x.permute(0, 3, 1, 2) / 127.5 - 1
