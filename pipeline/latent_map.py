"""A map of an autoencoder's latent space, for the explorer: its leading directions, training points, a few pictures.

It is made of the latent cache and travels in the model folder as explorer.json and explorer.safetensors.
"""

import base64
import io
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calotype.autoencoder import Vae, decode, load_autoencoder
from calotype.checkpoint import weights_hash, write_text
from calotype.data import Pictures, evenly_spaced
from calotype.errors import UserError
from calotype.images import denormalize, to_pil
from calotype.latents import Index, LatentCache, read_index
from calotype.sheet import read_sheet

VERSION = 1
MOST_POINTS = 1500
MOST_PICTURES = 12
MOST_DIRECTIONS = 8
_FILES = ("explorer.json", "explorer.safetensors")
_NO_NOISE = 1e-4  # a posterior narrower than this everywhere is that of an autoencoder without one


@dataclass(frozen=True)
class Facts:
    """What explorer.json holds; `shares` of the variance belong to the directions, `limit` is the largest |z| shown."""

    version: int
    shape: list[int]  # (c, h, w)
    image_size: list[int]  # (height, width)
    channels: int
    classes: list[str]
    split: str  # that the pictures are of
    shares: list[float]
    noise: bool  # whether the encoder gives a distribution
    limit: float


@dataclass(frozen=True)
class LatentMap:
    """Directions (k, D), orthonormal, through `mean` (D,), D = c h w; a code of two numbers has its own two axes.

    `points` (n, 2) are training pictures along the first two, with class ids (n,); `pictures` uint8 (m, C, H, W) are
    held out, with theirs (m,). An id of -1 means no class.
    """

    facts: Facts
    mean: Tensor
    directions: Tensor
    points: Tensor
    labels: Tensor
    pictures: Tensor
    picture_labels: Tensor

    @classmethod
    def survey(cls, run: Path, vae: Vae) -> Self:
        """The map of a run's latents; raises UserError where there is no cache, or a damaged one."""
        cache = LatentCache(run / "latents", "train")
        index = cache.index
        items = torch.tensor(evenly_spaced(len(cache), MOST_POINTS)).numpy()
        z = cache.gather(items, "mean").flatten(1)
        mean, directions, variances = principal_components(z, MOST_DIRECTIONS)
        split, pictures, picture_labels = _pictures(run, vae, index)
        facts = Facts(
            VERSION, index.shape, index.image_size, pictures.shape[1], index.classes, split,
            shares=(variances / z.var(0).sum().clamp_min(1e-12)).tolist(),
            noise="std" in cache.shards[0] and bool((cache.gather(items, "std") > _NO_NOISE).any()),
            limit=2 * float(z.abs().max()),
        )  # fmt: skip
        points = (z - mean) @ directions[:2].T
        return cls(facts, mean, directions, points, cache.gather(items, "label"), pictures, picture_labels)

    def save(self, folder: Path) -> None:
        """Write the two files."""
        tensors = {field.name: getattr(self, field.name).contiguous() for field in fields(self)[1:]}
        save_file(tensors, folder / _FILES[1])
        write_text(folder / _FILES[0], json.dumps(asdict(self.facts), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The map in a model folder, None where there is none; raises UserError for a damaged one."""
        if not (folder / _FILES[0]).is_file():
            return None
        try:
            facts = Facts(**json.loads((folder / _FILES[0]).read_text()))
            found = cls(facts, **load_file(folder / _FILES[1]))
            found._check()
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder / _FILES[0]} is damaged ({error}); export the model again.") from None
        return found

    def _check(self) -> None:
        size = math.prod(self.facts.shape)
        fits = self.mean.shape == (size,) and self.directions.shape == (len(self.facts.shares), size)
        fits = fits and self.points.shape == (len(self.labels), 2)
        fits = fits and self.pictures.shape == (len(self.picture_labels), self.facts.channels, *self.facts.image_size)
        if self.facts.version != VERSION or not fits:
            raise ValueError("its parts do not belong together")

    def for_browser(self) -> dict[str, Any]:
        """What explorer.js is given, as JSON: numbers rounded, directions as base64, pictures as addresses."""
        facts = self.facts
        largest = self.points.abs().flatten().quantile(0.995)
        return {
            "shape": facts.shape,
            "size": facts.image_size,
            "channels": facts.channels,
            "classes": facts.classes,
            "shares": [round(share, 4) for share in facts.shares],
            "axes": "code" if len(self.mean) == 2 else "components",
            "noise": facts.noise,
            "limit": facts.limit,
            "range": float(1.15 * largest.clamp_min(1e-3)),
            "mean": _base64(self.mean),
            "directions": _base64(self.directions),
            "points": [[round(x, 3), round(y, 3)] for x, y in self.points.tolist()],
            "labels": self.labels.tolist(),
            "pictures": [_address(pixels) for pixels in self.pictures],
            "pictureLabels": self.picture_labels.tolist(),
            "split": facts.split,
        }


def principal_components(z: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), leading directions (k, D) and variances (k,) of codes (n, D); for D = 2 the axes as they are."""
    if z.shape[1] == 2:
        return torch.zeros(2), torch.eye(2), z.var(0)
    mean = z.mean(0)
    x = (z - mean).double()
    wide = x.shape[1] > len(x)  # the smaller of the two products has the same spectrum
    values, vectors = torch.linalg.eigh((x @ x.T if wide else x.T @ x) / max(len(x) - 1, 1))
    count = min(most, int((values > 1e-9 * values[-1]).sum()))
    leading = vectors.flip(1)[:, :count]
    directions = torch.nn.functional.normalize((x.T @ leading if wide else leading).T, dim=1)
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    return mean, (directions * signs).float(), values.flip(0)[:count].float()


def _pictures(run: Path, vae: Vae, index: Index) -> tuple[str, Tensor, Tensor]:
    """The split, pixels (m, C, H, W) and class ids (m,) of a few pictures, held-out ones where there are any.

    Where the source has gone, they are what the autoencoder makes of their latents.
    """
    split = "val" if index.counts.get("val") else "train"
    cache = LatentCache(run / "latents", split)
    labels = cache.gather(torch.arange(len(cache)).numpy(), "label")
    items = _some_of_each(labels)
    try:
        source = Pictures(read_sheet(run / "data.json"), split)
        pixels = torch.stack([source[i] for i in items])
        source.refuse_gone()
    except UserError:
        with torch.no_grad():
            z = cache.gather(torch.tensor(items).numpy(), "mean").to(vae.device)
            pixels = denormalize(decode(vae, z, tuple(index.image_size))).cpu()
    return split, pixels, labels[items]


def _some_of_each(labels: Tensor) -> list[int]:
    """At most twelve items, as many of each class as there is room for, in the order of the classes."""
    classes = labels.unique().tolist()
    if len(classes) > MOST_PICTURES:
        classes = [classes[i] for i in evenly_spaced(len(classes), MOST_PICTURES)]
    each = 2 if 1 < len(classes) <= MOST_PICTURES // 2 else MOST_PICTURES if len(classes) == 1 else 1
    return [i for c in classes for i in (labels == c).nonzero().flatten()[:each].tolist()]


def write(run: Path, vae: Vae, folder: Path) -> None:
    """Put the map of a run into its model folder, unless the latents have gone or are of another autoencoder."""
    if (run / "latents" / "index.json").is_file() and _belongs(run):
        LatentMap.survey(run, vae).save(folder)


def open_run(run: Path) -> tuple[Vae, LatentMap]:
    """The autoencoder of a run with a map of its latents; raises UserError where they are not there."""
    vae = load_autoencoder(run / "stage1_vae" / "vae", "--run")
    if not _belongs(run):
        raise UserError(f"--run {run}: its latents are of another autoencoder; run `calotype encode --fresh`.")
    return vae, LatentMap.survey(run, vae)


def _belongs(run: Path) -> bool:
    """Whether the latents of a run are those of its autoencoder."""
    return read_index(run / "latents").vae == weights_hash(run / "stage1_vae" / "vae")


def _base64(x: Tensor) -> str:
    return base64.b64encode(x.float().contiguous().numpy().tobytes()).decode()


def _address(pixels: Tensor) -> str:
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
