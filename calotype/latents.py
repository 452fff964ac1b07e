"""The latent cache: what the autoencoder says of each picture, in safetensors shards under an index.

A shard holds `mean` and `std` (n, c, h, w) in fp16 (VQ: `mean` alone, the latent itself), the same for mirror images
where they were asked for, `label` (n,), and the captions as bytes with their ends. The index names the autoencoder and
the data that the cache belongs to, and the SHA-256 of every shard and of itself.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from calotype.data import Batch, Share
from calotype.disk import rename_file, sha256, write_text
from calotype.errors import UserError
from calotype.randomness import KeyedOrder, normal, uniform
from calotype.verified import Verified

VERSION = 2  # 2: SHA-256 of the shards and of the index


class Index(NamedTuple):
    """The content of index.json."""

    version: int
    fingerprint: str  # of the data sheet
    vae: str  # hash of the autoencoder's weights and config
    shape: list[int]  # (c, h, w)
    flip: bool
    classes: list[str]
    image_size: list[int]
    counts: dict[str, int]  # by split
    shards: dict[str, list[str]]  # by split
    sha256: dict[str, str]  # by shard

    def write(self, folder: Path) -> None:
        """Write index.json; a cache without it is unfinished."""
        content = self._asdict()
        write_text(folder / "index.json", json.dumps({**content, "self": _digest(content)}, indent=1))


def read_index(folder: Path) -> Index:
    """The index of a cache; raises UserError where there is none, or it is damaged or from another version."""
    file = folder / "index.json"
    try:
        content = json.loads(file.read_text())
        version, own = content["version"], content.pop("self", None)
    except OSError:
        raise UserError(f"--latents {folder} holds no finished cache; run `calotype encode` first.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a latent cache ({error}); run `calotype encode` again.") from None
    if version != VERSION:
        raise UserError(f"{folder} has format {version}, not {VERSION}; run `calotype encode --fresh` once more.")
    if own != _digest(content):
        raise UserError(f"{file} is damaged: it is not what was written; run `calotype encode` again.")
    return Index(**content)


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_shard(file: Path, moments: dict[str, Tensor], labels: Tensor, captions: list[str]) -> str:
    """Write one shard beside its place, bring it to the disk and rename it; returns its SHA-256."""
    texts = [caption.encode() for caption in captions]
    tensors = {name: value.to(torch.float16).contiguous() for name, value in moments.items()}
    tensors["label"] = labels.to(torch.int32)
    tensors["caption"] = torch.from_numpy(np.frombuffer(b"".join(texts), dtype=np.uint8).copy())
    tensors["caption_end"] = torch.tensor([len(text) for text in texts], dtype=torch.int64).cumsum(0)
    content = save(tensors)
    temporary = file.with_name(f".{file.name}")  # safetensors' own has a random name, which a kill would leave for ever
    temporary.write_bytes(content)
    rename_file(temporary, file)
    return hashlib.sha256(content).hexdigest()


class Shards:
    """The shards that are written so far and their SHA-256, in shards.json; what differs from it counts as missing."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "shards.json"
        self.sha256: dict[str, str] = {}
        try:
            self.sha256.update(json.loads(self.file.read_text()))
        except (OSError, ValueError, TypeError):
            return  # none yet, or unreadable: all are written again

    def has(self, name: str) -> bool:
        """Whether this shard lies there as it was written."""
        file = self.folder / name
        return name in self.sha256 and file.is_file() and sha256(file) == self.sha256[name]

    def write(self, name: str, moments: dict[str, Tensor], labels: Tensor, captions: list[str]) -> None:
        """Write a shard, and then its SHA-256."""
        self.sha256[name] = write_shard(self.folder / name, moments, labels, captions)
        write_text(self.file, json.dumps(self.sha256, indent=1))


class LatentCache:
    """One split of a cache, read where it lies: shards are mapped into memory, not loaded."""

    def __init__(self, folder: Path, split: Literal["train", "val"]):
        self.index = read_index(folder)
        _refuse_damaged(folder, self.index, split)
        self.shards = [load_file(folder / name) for name in self.index.shards[split]]
        self.ends = np.cumsum([len(shard["label"]) for shard in self.shards])
        self.starts = self.ends - np.diff(self.ends, prepend=0)
        if not self.shards or self.ends[-1] != self.index.counts[split]:
            raise UserError(f"{folder} does not hold the {split} latents that its index names; encode again.")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def gather(self, items: np.ndarray, name: str) -> Tensor:
        """Rows of the tensor called `name` for these items, in their order, in fp32 (labels: int64)."""
        where = np.searchsorted(self.ends, items, side="right")
        rows = torch.from_numpy(items - self.starts[where])
        if len(self.shards) == 1:
            found = self.shards[0][name].index_select(0, rows)
        else:
            found = self._gather_from_many(where, rows, name)
        return found.long() if name == "label" else found.float()

    def caption(self, item: int) -> str:
        """The caption of one item, or ""."""
        shard = self.shards[int(np.searchsorted(self.ends, item, side="right"))]
        row = item - int(self.ends[np.searchsorted(self.ends, item, side="right")]) + len(shard["label"])
        start = int(shard["caption_end"][row - 1]) if row else 0
        return bytes(shard["caption"][start : int(shard["caption_end"][row])].tolist()).decode()

    def sample(self, items: np.ndarray, eps: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Latents z = mean + std * eps (B, c, h, w); of the mirror images where `mirrored` (B,) says so."""
        z = self._posterior(items, eps, "")
        if mirrored is None or not self.index.flip:
            return z
        return torch.where(mirrored[:, None, None, None], self._posterior(items, eps, "_flipped"), z)

    def _posterior(self, items: np.ndarray, eps: Tensor, suffix: str) -> Tensor:
        mean = self.gather(items, "mean" + suffix)
        return mean + self.gather(items, "std" + suffix) * eps if "std" in self.shards[0] else mean

    def _gather_from_many(self, where: np.ndarray, rows: Tensor, name: str) -> Tensor:
        """Shard by shard into neighbouring places, and from there into the order that was asked for."""
        first, by_shard = self.shards[0][name], np.argsort(where, kind="stable")
        rows, found = rows[torch.from_numpy(by_shard)], first.new_empty(len(rows), *first.shape[1:])
        numbers, starts = np.unique(where[by_shard], return_index=True)
        for number, start, end in zip(numbers, starts, [*starts[1:], len(rows)], strict=True):
            torch.index_select(self.shards[number][name], 0, rows[start:end], out=found[start:end])
        return found[torch.from_numpy(np.argsort(by_shard))]


def _refuse_damaged(folder: Path, index: Index, split: str) -> None:
    """Raise UserError if a shard is missing or not what was written."""
    fault = Verified(folder).first_fault({name: index.sha256[name] for name in index.shards[split]})
    if fault:
        name, what = fault
        raise UserError(f"--latents: {folder / name} {what}; `calotype encode` writes what is wrong again.")


def mirrored(seed: int, start: int, count: int) -> Tensor:
    """Whether the examples at these positions (B,) are mirror images, where the cache holds such."""
    return uniform(seed, "flip", start, count) < 0.5


class LatentBatches:
    """Batches of sampled latents and labels; order, noise and mirroring are functions of the position."""

    def __init__(self, cache: LatentCache, seed: int):
        self.cache, self.seed = cache, seed
        self.order = KeyedOrder(len(cache), seed)

    def at(self, positions: range) -> Batch:
        """The batch at neighbouring positions: z (B, c, h, w), class ids (B,) and items (B,)."""
        items = self.order.indices(positions)
        start, count = positions.start, len(positions)
        eps = normal(self.seed, "posterior", start, count, tuple(self.cache.index.shape))
        z = self.cache.sample(items, eps, mirrored(self.seed, start, count))
        return Batch(z, self.cache.gather(items, "label"), start, torch.from_numpy(items))

    def from_step(self, step: int, share: Share) -> Iterator[Batch]:
        """The batches of one process from a step on, for ever."""
        while True:
            yield self.at(share.positions(step))
            step += 1
