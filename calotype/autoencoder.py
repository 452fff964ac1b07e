"""Saved autoencoders: any stock `AutoencoderKL` or `VQModel` folder, and the facts that Calotype keeps beside one."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from calotype.checkpoint import weights_hash, write_text
from calotype.errors import UserError
from calotype.weights import load_network, read_json

Vae = AutoencoderKL | VQModel
_FACTS = "calotype.json"


@dataclass(frozen=True)
class Facts:
    """What a bound on the likelihood needs and no stock configuration holds; empty for an autoencoder from elsewhere.

    `likelihood` is p(x|z): gaussian, laplace or bernoulli, with its `scale` in units of pixels in [-1, 1]. The latents
    of the saved autoencoder are shifted and scaled to zero mean and unit variance; `prior_mean` and `prior_std`, one
    number a channel, are the standard normal prior of training in these coordinates.
    """

    likelihood: str | None = None
    scale: float | None = None
    prior_mean: list[float] | None = None
    prior_std: list[float] | None = None


def write_facts(folder: Path, facts: Facts) -> None:
    """Write the facts beside a saved autoencoder."""
    write_text(folder / _FACTS, json.dumps(asdict(facts), indent=1))


def read_facts(folder: Path) -> Facts:
    """The facts beside a saved autoencoder; raises UserError if the file is damaged."""
    file = folder / _FACTS
    if not file.is_file():
        return Facts()
    try:
        given = json.loads(file.read_text())
        return Facts(**{field.name: given[field.name] for field in fields(Facts)})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}); export the autoencoder again.") from None


def load_autoencoder(folder: Path, flag: str) -> Vae:
    """A saved autoencoder, never fetched from elsewhere; raises UserError naming the flag."""
    if folder.is_file():
        raise UserError(f"{flag} {folder} is a file; turn it into a folder first: calotype convert {folder} --out DIR.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{flag} {folder} is not a saved autoencoder (it holds no config.json); give another folder.")
    kind = read_json(folder / "config.json", flag).get("_class_name")
    classes = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
    if kind not in classes:
        raise UserError(f"{flag} {folder} holds a {str(kind)[:60]}; give an AutoencoderKL or VQModel.")
    return load_network(classes[kind], folder, flag)


def find_autoencoder(latents: Path, vae: Path | None, expected: str) -> Path:
    """The folder of a cache's autoencoder, --vae or beside it; raises UserError if it is not the one that made it."""
    folder = vae or latents.resolve().parent / "stage1_vae" / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"--vae {folder} is not a saved autoencoder; name the one that made --latents.")
    if weights_hash(folder) != expected:
        raise UserError(
            f"--latents {latents} was made by another autoencoder than --vae {folder}; "
            "run `calotype encode` with this one."
        )
    return folder


def downsampling(vae: Vae) -> int:
    """Picture side divided by latent side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def posterior(vae: Vae, x: Tensor) -> dict[str, Tensor]:
    """`mean` and `std` (B, c, h, w) of q(z|x), x (B, C, H, W) in [-1, 1]; for VQ the quantised latent and no `std`."""
    x = pad(x, downsampling(vae))
    if isinstance(vae, VQModel):
        h = vae.encode(x).latents.float()
        return {"mean": vae.quantize(h)[0]}
    distribution = vae.encode(x).latent_dist
    return {"mean": distribution.mean.float(), "std": distribution.std.float()}


def decode(vae: Vae, z: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (B, C, *size), not clamped, of latents (B, c, h, w) in the coordinates that `posterior` gives."""
    return crop(vae.decode(z.to(vae.dtype)).sample.float(), size)


def pad(x: Tensor, factor: int) -> Tensor:
    """Pictures smaller than one latent element's patch, grown to it by repeating their edges; others as they are.

    So a 12x12 picture becomes a code of 1x1 by way of 16x16. `crop` undoes it.
    """
    height, width = (max(factor - side, 0) for side in x.shape[2:])
    if not height and not width:
        return x
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2), mode="replicate")


def crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle (B, C, *size) of pictures that `pad` had made larger."""
    top, left = ((side - want) // 2 for side, want in zip(x.shape[2:], size))
    return x[:, :, top : top + size[0], left : left + size[1]]
