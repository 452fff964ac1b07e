"""Pictures of a data sheet, and batches of them by position."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain, count
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from calotype import shapes
from calotype.errors import UserError
from calotype.folder import on_disk
from calotype.images import draft_for, fit_image, to_uint8
from calotype.picture_files import UnreadableImage, display_name, load_image
from calotype.randomness import KeyedOrder, uniform
from calotype.sheet import VARIATIONS, Record, Sheet

_MEMORY = 2**30  # bytes of decoded pictures that a process may keep


class Batch(NamedTuple):
    """Examples at neighbouring positions: pictures uint8 (B, C, H, W) or latents (B, c, h, w), and class ids (B,).

    Latents also say which items (B,) of their cache they are; these stay on the CPU. `unread` names the pictures of the
    split that could not be read, by number; others stand in for them.
    """

    x: Tensor
    label: Tensor
    start: int
    item: Tensor | None = None
    unread: tuple[int, ...] = ()

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
        self.stand_ins: dict[int, int] = {}  # of items that could not be read

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Tensor:
        """Picture i; one that has gone bad since it was checked is replaced by the next good one."""
        for j in range(i, i + len(self)):
            try:
                x = self.read(j % len(self))
            except UnreadableImage as error:
                self._note(self.records[j % len(self)], error)
                continue
            if j > i:
                self.stand_ins[i] = j % len(self)
            return x
        raise self.none_left()

    def read(self, i: int) -> Tensor:
        """Picture i itself; raises UnreadableImage if it has gone bad since it was checked."""
        if self._kept is None or i not in self._kept:
            x = to_uint8(self._picture(self.records[i]))
            if self._kept is None:
                return x
            self._kept[i] = x
        return self._kept[i]

    def none_left(self) -> UserError:
        """What to raise where no picture can stand in for another."""
        return UserError(f"none of the pictures below {self._root} can be read any more; was the folder moved?")

    def path(self, i: int) -> Path:
        """The file of picture i."""
        return on_disk(self._root, self.records[i].file)

    def refuse_gone(self) -> None:
        """Raise UserError if a picture has gone bad since the data sheet was made."""
        if self.gone:
            raise UserError(
                f"{display_name(on_disk(self._root, min(self.gone)))} can no longer be read; mend it, or run "
                "`calotype data` with --fresh."
            )

    def _picture(self, record: Record):
        if self.sheet.source in VARIATIONS:
            variation = VARIATIONS[self.sheet.source]
            picture = shapes.render(shapes.draw_factors(self.sheet.seed, int(record.file), variation), self.size)
            return picture.convert("L") if self.sheet.channels == 1 else picture
        file = on_disk(self._root, record.file)
        prepared = self.sheet.prepared and self.sheet.prepared.take(file, self.sheet.channels)
        if prepared:
            return prepared
        picture = load_image(file, channels=self.sheet.channels, draft_size=draft_for(self.size))
        return fit_image(picture, self.size, self.sheet.fit)

    def _note(self, record: Record, error: UnreadableImage) -> None:
        if not self.gone:
            print(f"Replaced by the next picture from now on, as others would be: {error}")
        self.gone.add(record.file)


class PictureBatches:
    """The batches of one process from a step on, for ever: order and mirroring are functions of the position.

    Where a picture can no longer be read, that of the next position stands in for it, with its own label.
    """

    def __init__(self, pictures: Pictures, *, seed: int, flip: bool):
        self.pictures, self.seed, self.flip = pictures, seed, flip
        self.order = KeyedOrder(len(pictures), seed)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int, tuple[int, ...]]:
        x, i, unread = self._first_readable(position)
        if self.flip and uniform(self.seed, "flip", position, 1) < 0.5:
            x = x.flip(-1)
        return x, self.pictures.labels[i], position, unread

    def _first_readable(self, position: int) -> tuple[Tensor, int, tuple[int, ...]]:
        """The first picture from a position on that can be read, its number, and the numbers of those before it."""
        unread: list[int] = []
        for near in range(position, position + 2 * len(self.pictures)):  # so that a whole epoch lies within
            i = self.order.index(near)
            try:
                return self.pictures.read(i), i, tuple(unread)
            except UnreadableImage:
                unread.append(i)
        raise self.pictures.none_left()

    def from_step(self, step: int, share: "Share", workers: int = 0) -> Iterator[Batch]:
        """Batches from `step` on; worker processes, if any, decode ahead."""
        positions = _Positions(step, share)
        batches = iter(DataLoader(self, batch_sampler=positions, num_workers=workers, collate_fn=_collate))
        while True:
            try:
                yield next(batches)
            except UserError as error:  # a worker sends it with all its traceback
                raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None
            except (OSError, EOFError):  # a dying worker's pipe breaks a moment before torch hears of its death,
                time.sleep(1)  # and names it here
                raise


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


def _collate(items: list[tuple[Tensor, Tensor, int, tuple[int, ...]]]) -> Batch:
    pictures, labels, positions, unread = zip(*items, strict=True)
    return Batch(torch.stack(pictures), torch.stack(labels), positions[0], unread=tuple(chain(*unread)))


class _Positions(NamedTuple):
    """The positions of each batch from a step on; a class, because worker processes may have to pickle it."""

    step: int
    share: Share

    def __iter__(self) -> Iterator[list[int]]:
        for step in count(self.step):
            yield list(self.share.positions(step))
