"""What samples of a run look like while it trains: a sheet, and a cheap distance."""

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from calotype import device
from calotype.autoencoder import Vae, decode
from calotype.data import evenly_spaced
from calotype.features import CheapKid
from calotype.images import SHEET, image_grid, normalize, sheet_labels
from calotype.latents import LatentCache
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.stage2_diffusion.conditioning import Condition

_ROWS, _COLUMNS = SHEET
_WATCH_STEPS = 8


class Watch:
    """Kernel distance of a few samples to held-out latents, decoded both, in the encoder's features.

    Cheap, to see how a run goes: few samples, few steps, no guidance. Labels, captions and given pictures are those of
    other held-out pictures than the ones compared with: with the same the distance would come out below 0.
    """

    def __init__(self, condition: Condition, held_out: LatentCache, vae: Vae, count: int, precision: str):
        self.condition, self.precision = condition, precision
        items = evenly_spaced(len(held_out), 2 * count)
        self.items, reference = items[1::2], items[::2]
        z = held_out.gather(torch.tensor(reference).numpy(), "mean").to(vae.device)
        with device.autocast(precision):
            x = torch.cat([decode(vae, part, tuple(held_out.index.image_size)) for part in z.split(64)])
        self.kid = CheapKid(vae, x.float().clamp(-1, 1))

    def of(self, pipe: LatentDiffusionPipeline) -> float:
        """The distance of samples drawn now, always from the same seeds."""
        arguments = self.condition.drawing(self.items)
        few = {"num_inference_steps": min(_WATCH_STEPS, pipe.default_steps), "guidance_scale": 1.0}
        x = _draw(pipe, len(self.items), self.precision, arguments | few)
        return self.kid.of(normalize(x.to(pipe.device)))


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
