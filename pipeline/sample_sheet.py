"""The sample sheet of a model folder."""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from calotype import device
from calotype.data import Pictures, evenly_spaced
from calotype.images import image_grid
from calotype.pipeline.given import given
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.sheet import read_sheet

_MOST = 48
_COLUMNS = 8


def sample_sheet(pipe: LatentDiffusionPipeline, run: Path, seed: int) -> Image.Image:
    """Every class or example prompt while there is room (at most 48); held-out pictures above what becomes of them."""
    for network in (pipe.unet, pipe.guide):
        if network is not None:
            device.for_drawing(network)
    pipe.set_progress_bar_config(disable=True)
    if pipe.takes_image:
        return _given_and_made(pipe, run, seed)
    names = _example_prompts(run) if pipe.condition == "text" else pipe.labels
    names = names[:_MOST]
    columns = _columns(len(names)) if names else _COLUMNS
    rows = max(1, _MOST // columns) if len(names) <= columns else -(-len(names) // columns)
    labels = [names[i % len(names)] for i in range(rows * columns)] if names else None
    x = pipe(labels, rows * columns, seed=seed, output_type="pt").images
    return image_grid(_to_uint8(x), columns, labels)


def _given_and_made(pipe: LatentDiffusionPipeline, run: Path, seed: int) -> Image.Image:
    """Rows of what held-out pictures were made into, each above what the model makes of it."""
    pictures = Pictures(read_sheet(run / "data.json"), "val")
    items = evenly_spaced(len(pictures), _MOST // 2)
    order, shown = given(pipe, pictures, items)
    made = _to_uint8(pipe(num_images=len(items), seed=seed, output_type="pt", **order).images)
    rows = [row for pair in zip(shown.split(_COLUMNS), made.split(_COLUMNS), strict=True) for row in pair]
    return image_grid(torch.cat(rows), min(_COLUMNS, len(items)))


def _to_uint8(x: Tensor) -> Tensor:
    return (x * 255).round().to(torch.uint8).cpu()


def _example_prompts(run: Path) -> list[str]:
    """Captions that the training has kept as examples; without any, nothing is asked for."""
    return json.loads((run / "stage2_diffusion" / "model.json").read_text()).get("prompts", [])


def _columns(count: int) -> int:
    """Columns of a sheet: 48 classes stand as 8 colours below 6 shapes, ten as ten columns."""
    return next((n for n in (6, 8, 10, 12) if count % n == 0 and count > 12), min(count, 12))
