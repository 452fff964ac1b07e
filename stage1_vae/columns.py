"""One file with a row for every picture: what `embed` and `tokens` share."""

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from calotype import device
from calotype.autoencoder import Vae, load_autoencoder
from calotype.data import Pictures
from calotype.errors import UserError
from calotype.images import normalize
from calotype.sheet import Sheet, open_sheet
from calotype.stage1_vae.config import EmbedSettings
from calotype.stage1_vae.models import check_fits

SPLITS = ("train", "val")
Measure = Callable[[Tensor], Tensor]  # pictures (B, C, H, W) in [-1, 1] -> anything (B, ...)


def refuse_out(out: Path, fresh: bool, suffixes: tuple[str, ...]) -> None:
    """Raise UserError if the file cannot be written: another kind, a folder, or one that would be lost."""
    if out.suffix not in suffixes:
        raise UserError(f"--out {out} must end in {' or '.join(suffixes)}; try {out.with_suffix(suffixes[0])}.")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file.")
    if out.exists() and not fresh:
        raise UserError(f"--out {out} is there already; give another name, or --fresh to replace it.")


def open_autoencoder(settings: EmbedSettings) -> Vae:
    """The autoencoder that --vae names, on its device; raises UserError."""
    vae = load_autoencoder(settings.vae, "--vae").to(device.device())
    device.for_drawing(vae)
    return vae


def open_pictures(vae: Vae, settings: EmbedSettings) -> Sheet:
    """The data sheet of the pictures; raises UserError where the autoencoder cannot take them."""
    # --out is a file, so no sheet lies in it: SOURCE is a data.json or is read now.
    sheet = open_sheet(settings.source, settings, settings.seed, settings.out, str(vae.config.sample_size))
    check_fits(vae, sheet.channels, tuple(sheet.image_size))
    return sheet


@torch.no_grad()
def measure_pictures(
    measure: Measure, pictures: Pictures, numbers: Sequence[int], batch_size: int, title: str
) -> np.ndarray:
    """What `measure` finds in these pictures, as one array (n, ...)."""
    found = None
    for start in track(range(0, len(numbers), batch_size), title, transient=True):
        x = torch.stack([pictures[i] for i in numbers[start : start + batch_size]])
        pictures.refuse_gone()  # a neighbour in its place would bear the wrong name
        values = measure(normalize(x.to(device.device()))).cpu().numpy()
        if found is None:  # filled in place: a list of batches would need the memory twice
            found = np.empty((len(numbers), *values.shape[1:]), values.dtype)
        found[start : start + len(values)] = values
    return found


def describe_pictures(sheet: Sheet) -> dict[str, np.ndarray]:
    """Columns `file`, `split` and `label` (N,), text: the training pictures first, each split in the sheet's order."""
    records = [(record, split) for split in SPLITS for record in sheet.records if record.val == (split == "val")]
    return {
        "file": np.array([record.file for record, _ in records], dtype=np.str_),
        "split": np.array([split for _, split in records], dtype=np.str_),
        "label": np.array([label_name(sheet, record.label) for record, _ in records], dtype=np.str_),
    }


def label_name(sheet: Sheet, label: int) -> str:
    """The name of a class id; empty for a picture without one."""
    return sheet.class_names[label] if label >= 0 else ""


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A stream that becomes `file` when the block ends well; otherwise what was there stays and nothing is left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.part")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_npz(stream: BinaryIO, columns: dict[str, np.ndarray]) -> None:
    """Write arrays that `np.load` reads without pickle; `np.savez` has no room for a column called `file`."""
    with zipfile.ZipFile(stream, "w") as archive:
        for name, column in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, column, allow_pickle=False)
