"""Reading a source, once: the embedded shapes, or every file of a folder through the image gate."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.progress import track

from calotype import shapes
from calotype.config import DataSettings, fraction_of
from calotype.errors import UserError
from calotype.folder import Entry, on_disk, survey
from calotype.folder_notes import header_notes, notes
from calotype.images import draft_for
from calotype.picture_files import Header, UnreadableImage, display_name, inspect, load_image
from calotype.prepared import Prepared
from calotype.reading import each, listing, refuse_many_bad, sha256

UNLABELLED = -1
SHAPES_COUNT = 12_000  # a multiple of 48, so that every class has as many
DEFAULT_FRACTION = 0.05
_CHECKED = 128  # pixels of the shorter side at which a JPEG is decoded to see whether it can be
_APART = 16  # pixels
VARIATIONS = {"shapes": shapes.PLAIN, "shapes:full": shapes.FULL}


class Record(NamedTuple):
    """One picture: its file (or number), class id or -1, caption or "", whether it is held out, its bytes and SHA-256.

    Of a drawn source, and in sheets from before these were kept, the last two are 0 and "".
    """

    file: str
    label: int
    text: str
    val: bool
    bytes: int = 0
    sha256: str = ""


class Found(NamedTuple):
    """What reading a source found."""

    records: list[Record]
    classes: list[str]
    channels: int
    sizes: dict[str, int]
    bad: list[dict]  # file, reason, bytes and root
    root: str = ""
    val_root: str | None = None
    listing: str = ""
    notes: tuple[str, ...] = ()


def read_shapes(source: str, seed: int, fraction: float) -> Found:
    """The drawn shapes; nothing is read."""
    names = [str(i) for i in range(SHAPES_COUNT)]
    held_out = _held_out(names, fraction)
    factors = [shapes.draw_factors(seed, i, VARIATIONS[source]) for i in range(SHAPES_COUNT)]
    records = [Record(n, f.label, f.caption, val) for n, f, val in zip(names, factors, held_out, strict=True)]
    return Found(records, list(shapes.CLASSES), 3, {}, [])


def read_folder(root: Path, settings: DataSettings, prepared: Prepared | None = None) -> Found:
    """Decode every file of a folder, and of the folder that --val may name; raises UserError.

    `prepared` gets the pictures.
    """
    fraction = fraction_of(settings.val) or DEFAULT_FRACTION
    val_root = Path(settings.val) if settings.val and fraction_of(settings.val) is None else None
    if val_root and val_root.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--val {val_root} lies inside SOURCE {root}, so it would be trained on; move it outside.")
    seen, seen_val = survey(root), survey(val_root) if val_root else None
    train = _check(root, seen.entries, prepared)
    val = _check(val_root, seen_val.entries, prepared) if val_root else []
    good, bad = [c for c in train + val if not c.fault], [c for c in train + val if c.fault]
    refuse_many_bad(root, [c.fault for c in bad], len(train + val), settings.allow_bad)
    classes = sorted({c.entry.label for c in train if c.entry.label and not c.fault})
    _refuse_unknown_label(val_root, val, classes)
    in_train = sum(not c.fault for c in train)
    held_out = [False] * in_train if val_root else _held_out([c.entry.file for c in good], fraction)
    held_out += [True] * (len(good) - len(held_out))
    return Found(
        records=_records(good, held_out, classes),
        classes=classes,
        channels=1 if all(c.grey for c in good) else 3,
        sizes=dict(Counter(f"{c.header.size[1]}x{c.header.size[0]}" for c in good).most_common(20)),
        bad=[_said_of_bad(c, root) for c in train if c.fault] + [_said_of_bad(c, val_root) for c in val if c.fault],
        root=str(root.resolve()),
        val_root=str(val_root.resolve()) if val_root else None,
        listing=listing([*seen.entries, *(seen_val.entries if seen_val else [])]),
        notes=(*notes(seen), *header_notes([c.header for c in good])),
    )


class _Checked(NamedTuple):
    """A file after the image gate: its fault, or what it holds."""

    entry: Entry
    fault: str = ""
    header: Header = Header((0, 0), "", "", False)
    grey: bool = True
    hash: str = ""


def _check(root: Path, entries: list[Entry], prepared: Prepared | None) -> list[_Checked]:
    """Decode every file once: only that finds the damaged ones before step 40,000 does.

    A JPEG at a fraction of its size: every byte of it is read all the same.
    """
    inside, size = root.resolve(), draft_for(prepared.size) if prepared else _CHECKED

    def check(entry: Entry) -> _Checked:
        file = on_disk(root, entry.file)
        try:
            picture = load_image(file, channels=3, draft_size=size)
            checked = _Checked(entry, "", inspect(file), _is_grey(picture), sha256(file))
        except UnreadableImage as error:
            return _Checked(entry, fault=str(error))
        except OSError as error:  # it went away in between
            return _Checked(entry, fault=f"{display_name(file)}: {error.strerror}")
        if prepared is not None:
            prepared.add(on_disk(inside, entry.file), picture)
        return checked

    return list(track(each(check, entries), f"Reading {root}", len(entries), transient=True))


def _said_of_bad(checked: _Checked, root: Path) -> dict:
    entry = checked.entry
    return {"file": entry.file, "reason": checked.fault, "bytes": entry.bytes, "root": str(root.resolve())}


def _records(good: list[_Checked], held_out: list[bool], classes: list[str]) -> list[Record]:
    number = {name: i for i, name in enumerate(classes)}
    return [
        Record(c.entry.file, number.get(c.entry.label, UNLABELLED), c.entry.text, val, c.entry.bytes, c.hash)
        for c, val in zip(good, held_out, strict=True)
    ]


def _is_grey(picture: Image.Image) -> bool:
    rgb = np.asarray(picture)
    few = rgb[::_APART, ::_APART]  # nearly always enough to see that a picture is not
    return all(np.array_equal(x[..., 0], x[..., i]) for x in (few, rgb) for i in (1, 2))


def _held_out(names: list[str], fraction: float) -> list[bool]:
    """Which names are held out: by hash, so that a new file never moves an old one; at least one, never all."""
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    score = [int.from_bytes(hashlib.blake2b(n, digest_size=8).digest(), "big") / 2**64 for n in encoded]
    held = [s < fraction for s in score]
    if len(names) > 1 and sum(held) in (0, len(names)):
        lowest = score.index(min(score))
        held = [i == lowest for i in range(len(names))]
    return held


def _refuse_unknown_label(val_root: Path | None, val: list[_Checked], classes: list[str]) -> None:
    known = set(classes)
    for checked in val:
        if not checked.fault and checked.entry.label and checked.entry.label not in known:
            raise UserError(
                f"--val {val_root}: {display_name(checked.entry.file)} has label {checked.entry.label!r}, "
                "which SOURCE does not have."
            )
