"""What a plan must know of a source: how many pictures there are, how large, and what reading them takes."""

import io
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from calotype.config import PROCEDURAL, DataSettings, fraction_of
from calotype.errors import UserError
from calotype.folder import Entry, on_disk, survey
from calotype.planning import Cost
from calotype.sheet import Sheet, make_sheet
from calotype.source import DEFAULT_FRACTION

_FIRST, _MOST = 16, 256  # pictures that are read, to begin with and at most
_SECONDS = 4.0  # that reading them may take
_HELD_OUT = 4  # one in so many of these
R = TypeVar("R")


@dataclass(frozen=True)
class Found:
    """Counts of a source, what looking through it and checking one picture took, and the sheet of a few pictures."""

    train: int
    val: int
    classes: int
    survey: Cost
    check: Cost
    own: int | None  # the middle of the pictures' shorter sides; None where they are drawn at any size
    some: Sheet

    def write(self, folder: Path, size: tuple[int, int], fit: str | None) -> Path:
        """The data sheet of the few pictures, prepared at (height, width); returns its file."""
        with redirect_stdout(io.StringIO()):
            replace(self.some, image_size=list(size), fit=fit or self.some.fit).write(folder)
        return folder / "data.json"


def look_at(settings, room: Path) -> Found:
    """Look through the source of a plan and read a few of its pictures; raises UserError as `calotype run` would."""
    return _drawn(settings) if settings.source in PROCEDURAL else _folder(settings, room)


def _drawn(settings) -> Found:
    sheet, taken = _timed(lambda: make_sheet(settings.source, _data_settings(settings, settings.val), 0, "32"))
    train, val = ([r for r in sheet.records if r.val == held_out] for held_out in (False, True))
    some = replace(sheet, records=[*train[: _MOST * 3 // 4], *val[: _MOST // 4]])
    nothing, count = Cost(0.0, 0.0), len(sheet.records)
    return Found(len(train), len(val), len(sheet.classes), nothing, taken.times(1 / count), None, some)


def _folder(settings, room: Path) -> Found:
    root = Path(settings.source)
    if ":" in settings.source and not root.exists():
        raise UserError(f"SOURCE {root} is not known; give `shapes`, `shapes:full` or a folder of pictures.")
    seen, taken = _timed(lambda: survey(root))
    fraction = fraction_of(settings.val) or DEFAULT_FRACTION
    apart = bool(settings.val) and fraction_of(settings.val) is None
    val = len(survey(Path(settings.val)).entries) if apart else max(1, round(fraction * len(seen.entries)))
    train = len(seen.entries) - (0 if apart else val)
    if not train:
        raise UserError(f"SOURCE {root}: no picture is left to train on; add some, or change --val.")
    some, check = _read_some(settings, root, seen.entries, room)
    classes = len({entry.label for entry in seen.entries if entry.label})
    return Found(train, val, classes, taken, check, _middle_side(some), some)


def _read_some(settings, root: Path, entries: list[Entry], room: Path) -> tuple[Sheet, Cost]:
    """The sheet of a few pictures, as many as can be read in a few seconds, and what one of them took."""
    entries = sorted(entries, key=lambda entry: entry.label)
    first = _spread(entries, _FIRST)
    sheet, taken = _read(settings, root, first, room / "first")
    each = taken.times(1 / len(first))
    some = _spread(entries, min(_MOST, int(_SECONDS / max(each.seconds, 1e-6))))
    if len(some) > 2 * len(first):  # what both share is no matter of a picture
        sheet, more = _read(settings, root, some, room / "some")
        each = Cost(*(max(b - a, 0.0) for a, b in zip(taken, more))).times(1 / (len(some) - len(first)))
    records = [record._replace(val=i % _HELD_OUT == 1) for i, record in enumerate(sheet.records)]
    if len(records) < 2:
        records = [record._replace(val=held_out) for record in records for held_out in (False, True)]
    return replace(sheet, records=records, val_root=None), each


def _read(settings, root: Path, entries: list[Entry], folder: Path) -> tuple[Sheet, Cost]:
    """A data sheet of these pictures by way of links to them, and what all took."""
    numbers = {label: i for i, label in enumerate(sorted({entry.label for entry in entries}))}
    for i, entry in enumerate(entries):
        place = folder / f"class {numbers[entry.label]}" if entry.label else folder
        place.mkdir(parents=True, exist_ok=True)
        _link(on_disk(root, entry.file).resolve(), place / f"{i:05d}{Path(entry.file).suffix}")
    fraction = "0.5" if len(entries) > 1 else None
    with redirect_stdout(io.StringIO()):
        return _timed(lambda: _sheet_of(settings, folder, fraction, root))


def _link(file: Path, name: Path) -> None:
    """A link, or a copy where the system allows none."""
    try:
        name.symlink_to(file)
    except OSError:
        shutil.copyfile(file, name)


def _sheet_of(settings, folder: Path, fraction: str | None, root: Path) -> Sheet:
    try:
        return make_sheet(str(folder), _data_settings(settings, fraction), 0, "32")
    except UserError as error:  # of the links: the person knows the source
        raise UserError(str(error).replace(str(folder), str(root))) from None


def _data_settings(settings, val: str | None) -> DataSettings:
    return DataSettings(fit=settings.fit, channels=settings.channels, val=val, allow_bad=True)


def _middle_side(sheet: Sheet) -> int:
    sides = sorted(min(map(int, size.split("x"))) for size, count in sheet.sizes.items() for _ in range(count))
    return sides[len(sides) // 2]


def _spread(entries: list[Entry], most: int) -> list[Entry]:
    """At most so many, from all over the list."""
    return [entries[i * len(entries) // most] for i in range(most)] if most < len(entries) else entries


def _timed(work: Callable[[], R]) -> tuple[R, Cost]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, Cost(time.perf_counter() - wall, time.process_time() - cpu)
