"""What a model that draws from pictures is given, made of held-out ones."""

import torch
from PIL import Image
from torch import Tensor

from calotype.data import Pictures
from calotype.images import denormalize, normalize, to_pil
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.pictures import degrade, shrink


def given(pipe: LatentDiffusionPipeline, pictures: Pictures, items: list[int]) -> tuple[dict[str, list], Tensor]:
    """Arguments of a drawing for these items, and what is given of them as pictures uint8 (B, C, H, W).

    Small ones, edges, or a hole of half the width and height in the middle; labels where the model has any.
    """
    x = normalize(torch.stack([pictures[i] for i in items]))
    mask = torch.zeros(len(x), 1, *x.shape[2:])
    mask[:, :, x.shape[2] // 4 : -(x.shape[2] // 4), x.shape[3] // 4 : -(x.shape[3] // 4)] = 1
    shown = degrade(pipe.condition, x, mask)
    order = {"image": _to_pil(_as_taken(pipe.condition, x, shown))}
    if pipe.condition == "inpaint":
        order["mask"] = _to_pil(2 * mask - 1)
    if pipe.labels:
        order["label"] = [pipe.labels[i] if i >= 0 else None for i in pictures.labels[items].tolist()]
    return order, denormalize(shown)


def _as_taken(condition: str, x: Tensor, shown: Tensor) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] as the pipeline takes them."""
    return shrink(x, int(condition.partition(":")[2])) if condition.startswith("superres") else shown


def _to_pil(x: Tensor) -> list[Image.Image]:
    return [to_pil(pixels) for pixels in denormalize(x)]
