"""A linear map from latents to colours, for previews that cost next to nothing."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from calotype.autoencoder import Vae, decode
from calotype.data import evenly_spaced
from calotype.latents import LatentCache

_FITTED_ON = 256  # codes; each is a sample for every place in it


@torch.no_grad()
def of_cache(folder: Path, vae: Vae) -> dict:
    """The map for an autoencoder with this latent cache."""
    cache = LatentCache(folder, "train")
    items = torch.tensor(evenly_spaced(len(cache), _FITTED_ON)).numpy()
    z = cache.gather(items, "mean")
    size = tuple(cache.index.image_size)
    return fit(z, torch.cat([decode(vae, part, size) for part in z.to(vae.device).split(32)]))


def fit(z: Tensor, x: Tensor) -> dict:
    """Least squares from latents z (B, c, h, w) to the mean colours of the pictures x (B, C, H, W) beneath them.

    {"weight": {"0": [C numbers], …, one for each of c}, "bias": [C numbers]}
    """
    colours = F.interpolate(x.float().cpu(), z.shape[2:], mode="area").movedim(1, -1).flatten(0, -2)
    codes = F.pad(z.float().cpu().movedim(1, -1).flatten(0, -2), (0, 1), value=1.0)
    *weight, bias = torch.linalg.lstsq(codes.double(), colours.double(), driver="gelsd").solution.tolist()
    return {"weight": {str(i): row for i, row in enumerate(weight)}, "bias": bias}
