"""`calotype encode`: every picture through the encoder once; stage 2 reads the result."""

import json
import math
import shutil
from pathlib import Path

import torch
from diffusers import VQModel
from rich.progress import track
from torch import Tensor

from calotype import device
from calotype.autoencoder import Vae, load_autoencoder, posterior
from calotype.checkpoint import weights_hash, write_text
from calotype.data import Pictures
from calotype.data_change import changes, refuse_changed
from calotype.errors import UserError
from calotype.images import normalize
from calotype.latents import VERSION, Index, Shards
from calotype.lock import claimed
from calotype.reading import BAD_SHARE
from calotype.sheet import Sheet, open_sheet, refuse_flip, summary
from calotype.stage1_vae.config import EncodeSettings
from calotype.stage1_vae.folding import ensure_quant_convs
from calotype.stage1_vae.models import check_fits, latent_shape

_MOST_AT_ONCE, _FEWEST_AT_ONCE = 128, 8  # pictures
_PIXELS_AT_ONCE = 98_304  # of all of them, on a CPU


def main(settings: EncodeSettings) -> None:
    """Encode train and held-out pictures; interrupted, it goes on with the first shard that is missing."""
    vae = load_autoencoder(settings.vae, "--vae").to(device.device())
    size = vae.config.sample_size
    sheet = open_sheet(settings.source, settings, settings.seed, settings.out, str(size))
    refuse_flip(settings.flip, sheet)
    _refuse_changed(sheet, settings)
    check_fits(vae, sheet.channels, tuple(sheet.image_size))
    if not isinstance(vae, VQModel):
        ensure_quant_convs(vae)
    device.for_drawing(vae, settings.precision)
    with claimed(settings.out):
        _write_cache(vae, sheet, settings)


def _refuse_changed(sheet: Sheet, settings: EncodeSettings) -> None:
    """A few pictures may have gone while stage 1 trained: a night's run must not end here for them."""
    found = changes(sheet)
    few = not found.added and not found.changed and len(found.missing) <= BAD_SHARE * len(sheet.records)
    refuse_changed(sheet, allowed=settings.allow_data_change or few)


def _write_cache(vae: Vae, sheet: Sheet, settings: EncodeSettings) -> None:
    """Encode what is missing, and then write the index."""
    sheet.keep(Path(settings.source), settings.out)
    belongs_to = _claim(settings, sheet)
    shape = latent_shape(vae, tuple(sheet.image_size))
    _refuse_full_disk(settings, sheet, shape)
    print(summary(sheet))
    written = Shards(settings.out)
    shards = {split: _encode_split(vae, Pictures(sheet, split), split, settings, written) for split in ("train", "val")}
    Index(
        version=VERSION,
        fingerprint=belongs_to["fingerprint"],
        vae=belongs_to["vae"],
        shape=list(shape),
        flip=settings.flip,
        classes=sheet.class_names,
        image_size=sheet.image_size,
        counts=sheet.counts,
        shards=shards,
        sha256={name: written.sha256[name] for names in shards.values() for name in names},
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
        shards = [old for split in ("train", "val") for old in settings.out.glob(f"{split}-?????.safetensors")]
        for old in [*shards, settings.out / "index.json", settings.out / "shards.json", file]:
            old.unlink(missing_ok=True)
    if file.exists() and _read(file) != belongs_to:
        raise UserError(
            f"--out {settings.out} holds latents of another autoencoder, other pictures or other settings; "
            "give --fresh to replace them, or another --out."
        )
    write_text(file, json.dumps(belongs_to))
    return belongs_to


def _read(file: Path) -> dict | None:
    """What a JSON file holds; None if that cannot be read."""
    try:
        return json.loads(file.read_text())
    except ValueError:
        return None


def _refuse_full_disk(settings: EncodeSettings, sheet: Sheet, shape: tuple[int, int, int]) -> None:
    """Say before the work, not after it, that the cache will not fit."""
    need = 4 * math.prod(shape) * (1 + settings.flip) * sum(sheet.counts.values())  # mean and deviation in fp16
    there = sum(file.stat().st_size for file in settings.out.glob("*.safetensors"))
    free = shutil.disk_usage(settings.out).free
    if free < 1.1 * (need - there):
        raise UserError(f"--out {settings.out} has {free >> 20} MiB free and the cache needs {need >> 20}; free some.")


def _encode_split(vae: Vae, pictures: Pictures, split: str, settings: EncodeSettings, written: Shards) -> list[str]:
    """Write the shards of a split that are not there yet, or not whole; returns the names of all."""
    starts = range(0, len(pictures), settings.shard_size)
    names = [f"{split}-{i:05d}.safetensors" for i in range(len(starts))]
    for start, name in zip(track(starts, f"Encoding {split}", transient=True), names, strict=True):
        if not written.has(name):
            numbers = range(start, min(start + settings.shard_size, len(pictures)))
            moments = _encode(vae, pictures, numbers, settings)
            used = [pictures.stand_ins.get(i, i) for i in numbers]  # with a neighbour's latent, its label and caption
            captions = [pictures.records[i].text for i in used]
            written.write(name, moments, pictures.labels[used], captions)
    if pictures.gone:
        print(f"{len(pictures.gone):,} {split} pictures can no longer be read; neighbours stand in for them.")
    return names


def _at_once(size: tuple[int, int], given: int | None) -> int:
    """How many pictures are encoded at once; on a CPU a quarter of the time goes where they do not fit its caches."""
    if given is not None or device.device().type != "cpu":
        return given or _MOST_AT_ONCE
    return min(_MOST_AT_ONCE, max(_FEWEST_AT_ONCE, _PIXELS_AT_ONCE // (size[0] * size[1])))


def _encode(vae: Vae, pictures: Pictures, numbers: range, settings: EncodeSettings) -> dict[str, Tensor]:
    found: list[dict[str, Tensor]] = []
    at_once = _at_once(pictures.size, settings.batch_size)
    for i in range(numbers.start, numbers.stop, at_once):
        batch = torch.stack([pictures[j] for j in range(i, min(i + at_once, numbers.stop))])
        if len(pictures.gone) > BAD_SHARE * len(pictures) and not (settings.allow_bad or settings.allow_data_change):
            pictures.refuse_gone()
        x = normalize(batch.to(device.device()))
        with torch.no_grad(), device.autocast(settings.precision):
            moments = posterior(vae, x)
            if settings.flip:
                moments |= {f"{name}_flipped": value for name, value in posterior(vae, x.flip(-1)).items()}
        found.append({name: value.cpu().half() for name, value in moments.items()})
    return {name: torch.cat([moments[name] for moments in found]) for name in found[0]}
