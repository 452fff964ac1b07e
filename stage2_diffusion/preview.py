"""The sample sheet of a stage-2 run."""

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from calotype import device
from calotype.data import evenly_spaced
from calotype.images import image_grid
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.stage2_diffusion.conditioning import Condition

_ROWS, _COLUMNS = 4, 12


def sample_sheet(pipe: LatentDiffusionPipeline, condition: Condition, held_out: int, precision: str) -> Image.Image:
    """Samples (4 rows of 12) at fixed seeds: a column a class, captions of held-out pictures, or given pictures in
    the odd rows above what becomes of them.
    """
    count = _ROWS * _COLUMNS
    if condition.more_channels:
        return _given_and_made(pipe, condition, evenly_spaced(held_out, count // 2), precision)
    if condition.kind == "text":
        items = evenly_spaced(held_out, count)
        arguments = condition.drawing([items[i % len(items)] for i in range(count)])
    else:
        arguments = {"label": sheet_labels(condition.class_names, count)}
    return image_grid(_draw(pipe, count, precision, arguments), columns=_COLUMNS)


def _given_and_made(pipe, condition: Condition, items: list[int], precision: str) -> Image.Image:
    arguments = condition.drawing(items)
    made = _draw(pipe, len(items), precision, arguments)
    size = tuple(made.shape[2:])
    shown = [picture.resize(size[::-1], Image.Resampling.NEAREST) for picture in arguments["image"]]
    for picture, mask in zip(shown, arguments.get("mask", ()), strict=False):
        picture.paste(128 if picture.mode == "L" else (128, 128, 128), mask=mask)
    given = torch.stack([pil_to_tensor(picture) for picture in shown])
    rows = [row for pair in zip(given.split(_COLUMNS), made.split(_COLUMNS), strict=True) for row in pair]
    return image_grid(torch.cat(rows), columns=min(_COLUMNS, len(items)))


def _draw(pipe, count: int, precision: str, arguments: dict) -> Tensor:
    """Pictures uint8 (count, C, H, W)."""
    label = arguments.pop("label")
    with device.autocast(precision):
        x = pipe(label, count, output_type="pt", **arguments).images
    return (x * 255).round().byte().cpu()


def sheet_labels(class_names: list[str], count: int) -> list[int] | None:
    """Labels of a sample sheet: a column a class while they fit, else spread over all classes."""
    if len(class_names) > _COLUMNS:
        return [i * len(class_names) // count for i in range(count)]
    return [i % _COLUMNS % len(class_names) for i in range(count)] if class_names else None
