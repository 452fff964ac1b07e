"""Features of the pictures of a split, kept beside the run for as long as they are those of this data and network."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calotype import device
from calotype.data import Pictures
from calotype.disk import rename_file
from calotype.features import FeatureNetwork

_BATCH = 64
_STRANGE = re.compile(r"[^\w.-]")  # what is better not in the name of a file


def reference(folder: Path, split: str, pictures: Pictures, network: FeatureNetwork) -> Tensor:
    """Features (n, d) of all pictures of a split, out of FOLDER/reference-SPLIT-NETWORK.safetensors or into it."""
    file = folder / f"reference-{split}-{_STRANGE.sub('_', network.name)}.safetensors"
    facts = {
        "fingerprint": pictures.sheet.fingerprint,
        "n": str(len(pictures)),
        "network": network.name,
        "identity": network.identity,
    }
    kept = _read(file, facts)
    if kept is None:
        kept = network.of(_batches(pictures, f"Features of {split}"), device.device())
        temporary = file.with_name(f".{file.name}")
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"features": kept}, temporary, metadata=facts)
        rename_file(temporary, file)
    return kept


def _read(file: Path, facts: dict[str, str]) -> Tensor | None:
    """The features in a file, None where it is missing, damaged, or of other data or another network."""
    try:
        with safe_open(file, "pt") as kept:
            return kept.get_tensor("features") if kept.metadata() == facts else None
    except (OSError, SafetensorError):
        return None


def _batches(pictures: Pictures, title: str) -> Iterator[Tensor]:
    for start in track(range(0, len(pictures), _BATCH), title, transient=True):
        yield torch.stack([pictures[i] for i in range(start, min(start + _BATCH, len(pictures)))])
        pictures.refuse_gone()
