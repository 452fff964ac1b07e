"""JPEGs that are as much work as a camera's, and the usual way from a folder of them to latents."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from calotype.autoencoder import load_autoencoder
from calotype.device import device
from calotype.shapes import draw_factors, render

CLASSES, SIDES, QUALITY = 4, (500, 1000), 90
_GRAIN, _LIGHT = 6.0, 40.0  # levels of 255


def write_photographs(folder: Path, number: int, seed: int) -> Path:
    """Shapes of 500 to 1,000 pixels a side under uneven light, with grain, in a folder for each of four classes."""
    draw = np.random.default_rng(seed)
    for i in range(number):
        place = folder / f"class{i % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        size = tuple(int(side) for side in draw.integers(*SIDES, 2, endpoint=True))
        x = np.asarray(render(draw_factors(seed, i), size), np.float32)
        light = np.linspace(-_LIGHT, _LIGHT, size[0])[:, None] + np.linspace(-_LIGHT, _LIGHT, size[1])
        x = x + light[..., None] + _GRAIN * draw.standard_normal(x.shape)
        Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(place / f"{i:05d}.jpg", quality=QUALITY)
    return folder


@torch.no_grad()
def stock_pass(folder: Path, vae_folder: Path, size: int, out: Path) -> Tensor:
    """torchvision's loader as it is by default, batches of 32, encoded in fp32: moments (n, 2, c, h, w) in a file."""
    to_size = [transforms.Resize(size), transforms.CenterCrop(size)]
    to_tensor = [transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    loader = DataLoader(ImageFolder(folder, transforms.Compose(to_size + to_tensor)), batch_size=32)
    vae, found = load_autoencoder(vae_folder, "--vae").to(device()), []
    for x, _ in loader:
        moments = vae.encode(x.to(device())).latent_dist
        found.append(torch.stack([moments.mean, moments.std], dim=1).cpu())
    torch.save(torch.cat(found), out)
    return torch.cat(found)
