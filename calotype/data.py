"""Pictures of a data sheet, and batches of them by position."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from calotype import shapes
from calotype.errors import UserError
from calotype.images import UnreadableImage, fit_image, load_image, to_uint8
from calotype.randomness import KeyedOrder, uniform
from calotype.sheet import VARIATIONS, Record, Sheet

_MEMORY = 2**30  # bytes of decoded pictures that a process may keep


class Batch(NamedTuple):
    """Examples at neighbouring positions: pictures uint8 (B, C, H, W) or latents (B, c, h, w), and class ids (B,).

    Latents also say which items (B,) of their cache they are; these stay on the CPU.
    """

    x: Tensor
    label: Tensor
    start: int
    item: Tensor | None = None

    def part(self, i: int, parts: int) -> "Batch":
        """The i-th of `parts` equal parts."""
        size = len(self.x) // parts
        here = slice(i * size, (i + 1) * size)
        item = None if self.item is None else self.item[here]
        return Batch(self.x[here], self.label[here], self.start + i * size, item)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        x, label = self.x.to(device, non_blocking=True), self.label.to(device, non_blocking=True)
        return self._replace(x=x, label=label)


class Pictures:
    """The pictures of one split, ready for training: item i is uint8 (C, H, W)."""

    def __init__(self, sheet: Sheet, split: Literal["train", "val"]):
        self.sheet = sheet
        self.records = [record for record in sheet.records if record.val == (split == "val")]
        self.labels = torch.tensor([record.label for record in self.records], dtype=torch.int64)
        self.size = tuple(sheet.image_size)
        self._root = Path((split == "val" and sheet.val_root) or sheet.root)
        small = len(self.records) * sheet.channels * self.size[0] * self.size[1] <= _MEMORY
        self._kept: dict[int, Tensor] | None = {} if small else None
        self.gone: set[str] = set()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Tensor:
        if self._kept is None:
            return self._read(i)
        if i not in self._kept:
            self._kept[i] = self._read(i)
        return self._kept[i]

    def refuse_gone(self) -> None:
        """Raise UserError if a picture has gone bad since the data sheet was made."""
        if self.gone:
            raise UserError(
                f"{self._root / min(self.gone)} can no longer be read; mend it, or run `calotype data` with --fresh."
            )

    def _read(self, i: int) -> Tensor:
        """Picture i; one that has gone bad since it was checked is replaced by the next good one."""
        for j in range(len(self)):
            record = self.records[(i + j) % len(self)]
            try:
                return to_uint8(self._picture(record))
            except UnreadableImage as error:
                self._note(record, error)
        raise UserError(f"none of the pictures below {self._root} can be read any more; was the folder moved?")

    def _picture(self, record: Record):
        if self.sheet.source in VARIATIONS:
            variation = VARIATIONS[self.sheet.source]
            picture = shapes.render(shapes.draw_factors(self.sheet.seed, int(record.file), variation), self.size)
            return picture.convert("L") if self.sheet.channels == 1 else picture
        picture = load_image(self._root / record.file, channels=self.sheet.channels, draft_size=max(self.size))
        return fit_image(picture, self.size, self.sheet.fit)

    def _note(self, record: Record, error: UnreadableImage) -> None:
        if record.file not in self.gone:
            self.gone.add(record.file)
            print(f"Replaced by the next picture from now on: {error}")


class PictureBatches:
    """The batches of one process from a step on, for ever: order and mirroring are functions of the position."""

    def __init__(self, pictures: Pictures, *, seed: int, flip: bool):
        self.pictures, self.seed, self.flip = pictures, seed, flip
        self.order = KeyedOrder(len(pictures), seed)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
        i = self.order.index(position)
        x = self.pictures[i]
        if self.flip and uniform(self.seed, "flip", position, 1) < 0.5:
            x = x.flip(-1)
        return x, self.pictures.labels[i], position

    def from_step(self, step: int, share: "Share", workers: int = 0) -> Iterator[Batch]:
        """Batches from `step` on; worker processes, if any, decode ahead."""
        positions = _Positions(step, share)
        return iter(DataLoader(self, batch_sampler=positions, num_workers=workers, collate_fn=_collate))


class Share(NamedTuple):
    """The part of each global batch that one process works on."""

    batch_size: int
    rank: int
    world: int

    def positions(self, step: int) -> range:
        """The positions of this process at a step."""
        size = self.batch_size // self.world
        start = step * self.batch_size + self.rank * size
        return range(start, start + size)


def share_of(accelerator: Accelerator, batch_size: int, parts: int) -> Share:
    """This process's share; raises UserError if the batch does not divide."""
    world = accelerator.num_processes
    if batch_size % (world * parts):
        near = max(1, batch_size // (world * parts)) * world * parts
        raise UserError(
            f"--batch-size {batch_size} must be a multiple of {world} processes x {parts} micro-batches; try {near}."
        )
    return Share(batch_size, accelerator.process_index, world)


def micro_batches(accelerator: Accelerator, model: nn.Module, batch: Batch, parts: int) -> Iterator[Batch]:
    """The parts of a batch; gradients are averaged over the processes with the last one only."""
    for i in range(parts):
        with nullcontext() if i == parts - 1 else accelerator.no_sync(model):
            yield batch.part(i, parts)


def evenly_spaced(size: int, most: int) -> list[int]:
    """At most `most` items out of `size`, spread over all of them."""
    return [i * size // most for i in range(most)] if most < size else list(range(size))


def _collate(items: list[tuple[Tensor, Tensor, int]]) -> Batch:
    pictures, labels, positions = zip(*items, strict=True)
    return Batch(torch.stack(pictures), torch.stack(labels), positions[0])


class _Positions(NamedTuple):
    """The positions of each batch from a step on; a class, because worker processes may have to pickle it."""

    step: int
    share: Share

    def __iter__(self) -> Iterator[list[int]]:
        for step in count(self.step):
            yield list(self.share.positions(step))
