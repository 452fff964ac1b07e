"""`calotype encode`: every picture through the encoder once; stage 2 reads the result."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import VQModel
from rich.progress import track
from torch import Tensor

from calotype import device
from calotype.checkpoint import weights_hash, write_text
from calotype.data import Pictures
from calotype.errors import UserError
from calotype.images import normalize
from calotype.latents import VERSION, Index, write_shard
from calotype.sheet import VARIATIONS, Sheet, open_sheet, summary
from calotype.stage1_vae.config import EncodeSettings
from calotype.stage1_vae.folding import ensure_quant_convs
from calotype.stage1_vae.models import Vae, check_fits, latent_shape, load_vae


def main(settings: EncodeSettings) -> None:
    """Encode train and held-out pictures; interrupted, it goes on with the first shard that is missing."""
    vae = load_vae(settings.vae, "--vae").eval().to(device.device())
    size = vae.config.sample_size
    sheet = open_sheet(settings.source, settings, settings.seed, settings.out, str(size))
    _refuse_mirrored_words(settings, sheet)
    check_fits(vae, sheet.channels, tuple(sheet.image_size))
    settings.out.mkdir(parents=True, exist_ok=True)
    sheet.keep(Path(settings.source), settings.out)
    if not isinstance(vae, VQModel):
        ensure_quant_convs(vae)
    device.choose_attention(vae)
    belongs_to = _claim(settings, sheet)
    print(summary(sheet))
    shards = {split: _encode_split(vae, Pictures(sheet, split), split, settings) for split in ("train", "val")}
    Index(
        version=VERSION,
        fingerprint=belongs_to["fingerprint"],
        vae=belongs_to["vae"],
        shape=list(latent_shape(vae, tuple(sheet.image_size))),
        flip=settings.flip,
        classes=sheet.class_names,
        image_size=sheet.image_size,
        counts=sheet.counts,
        shards=shards,
    ).write(settings.out)
    print(f"Cached {sum(sheet.counts.values()):,} latents in {settings.out}.")


def _claim(settings: EncodeSettings, sheet: Sheet) -> dict:
    """What the cache belongs to; a folder that holds shards of something else is refused, or emptied by --fresh."""
    belongs_to = {
        "fingerprint": sheet.fingerprint,
        "vae": weights_hash(settings.vae),
        "flip": settings.flip,
        "shard_size": settings.shard_size,
        "precision": str(device.resolve_precision(settings.precision)),
    }
    file = settings.out / "encoding.json"
    if settings.fresh:
        for old in [*settings.out.glob("*.safetensors"), settings.out / "index.json", file]:
            old.unlink(missing_ok=True)
    if file.exists() and json.loads(file.read_text()) != belongs_to:
        raise UserError(
            f"--out {settings.out} holds latents of another autoencoder, other pictures or other settings; "
            "give --fresh to replace them, or another --out."
        )
    write_text(file, json.dumps(belongs_to))
    _refuse_full_disk(settings.out, sheet)
    return belongs_to


def _refuse_full_disk(out: Path, sheet: Sheet) -> None:
    pixels = sheet.image_size[0] * sheet.image_size[1] * sheet.channels
    need = 2 * pixels * sum(sheet.counts.values())  # a generous bound: latents hold fewer numbers than pictures
    free = shutil.disk_usage(out).free
    if free < need / 8:
        raise UserError(f"--out {out} has {free >> 20} MiB free and the cache may need {need >> 23} MiB; free some.")


def _refuse_mirrored_words(settings: EncodeSettings, sheet: Sheet) -> None:
    if settings.flip and (sheet.captions or sheet.source in VARIATIONS):
        raise UserError(
            "--flip: the pictures have captions, and a caption that says left or right is wrong for the mirror image; "
            "leave the flag out."
        )


def _encode_split(vae: Vae, pictures: Pictures, split: str, settings: EncodeSettings) -> list[str]:
    """Write the shards of a split that are not there yet; returns the names of all."""
    starts = range(0, len(pictures), settings.shard_size)
    names = [f"{split}-{i:05d}.safetensors" for i in range(len(starts))]
    for start, name in zip(track(starts, f"Encoding {split}", transient=True), names, strict=True):
        if not (settings.out / name).exists():
            numbers = range(start, min(start + settings.shard_size, len(pictures)))
            moments = _encode(vae, pictures, numbers, settings)
            captions = [pictures.records[i].text for i in numbers]
            write_shard(settings.out / name, moments, pictures.labels[numbers.start : numbers.stop], captions)
    return names


def _encode(vae: Vae, pictures: Pictures, numbers: range, settings: EncodeSettings) -> dict[str, Tensor]:
    found: list[dict[str, Tensor]] = []
    for i in range(numbers.start, numbers.stop, settings.batch_size):
        batch = torch.stack([pictures[j] for j in range(i, min(i + settings.batch_size, numbers.stop))])
        x = normalize(batch.to(device.device()))
        with torch.no_grad(), device.autocast(settings.precision):
            moments = posterior(vae, x)
            if settings.flip:
                moments |= {f"{name}_flipped": value for name, value in posterior(vae, x.flip(-1)).items()}
        found.append({name: value.cpu().half() for name, value in moments.items()})
    return {name: torch.cat([moments[name] for moments in found]) for name in found[0]}


def posterior(vae: Vae, x: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation (B, c, h, w) of q(z|x); for VQ the quantised latent as the mean, and no deviation."""
    if isinstance(vae, VQModel):
        h = vae.encode(x).latents.float()
        return {"mean": vae.quantize(h)[0]}
    distribution = vae.encode(x).latent_dist
    return {"mean": distribution.mean.float(), "std": distribution.std.float()}
