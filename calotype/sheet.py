"""Image sources, the embedded shapes or a folder, and their data sheet.

A source is read once. What was found goes into data.json (the sheet) and manifest.jsonl (a line a picture); later
commands take the sheet as their SOURCE and never list the files again.
"""

import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.progress import track

from calotype import checkpoint, shapes
from calotype.config import PRESET_IMAGE_SIZE, DataSettings, fraction_of, height_width
from calotype.errors import UserError
from calotype.folder import Entry, list_pictures
from calotype.images import UnreadableImage, header_size, load_image

UNLABELLED = -1
SHAPES_COUNT = 12_000  # a multiple of 48, so that every class has as many
_BAD_SHARE = 0.01
_DEFAULT_FRACTION = 0.05
_PURPOSES = {"train": "train on", "val": "hold out"}
VARIATIONS = {"shapes": shapes.PLAIN, "shapes:full": shapes.FULL}


class Record(NamedTuple):
    """One picture: its file (or number), class id or -1, caption or "", and whether it is held out."""

    file: str
    label: int
    text: str
    val: bool


@dataclass
class Sheet:
    """What was read: the content of data.json."""

    source: str
    root: str
    val: str
    image_size: list[int]
    fit: str
    channels: int
    seed: int
    counts: dict[str, int]
    classes: dict[str, int]
    captions: bool
    sizes: dict[str, int]
    bad_count: int
    bad: list[dict[str, str]]
    manifest: str = ""
    fingerprint: str = ""
    val_root: str | None = None
    records: list[Record] = field(default_factory=list, repr=False)

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their ids; empty where the pictures have no classes."""
        return list(self.classes)

    def write(self, out: Path) -> None:
        """Write data.json and manifest.jsonl."""
        out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(record, ensure_ascii=True) + "\n" for record in self.records)
        self.manifest = hashlib.sha256(lines.encode()).hexdigest()
        checkpoint.write_text(out / "manifest.jsonl", lines)
        content = {k: v for k, v in asdict(self).items() if k != "records"}
        checkpoint.write_text(out / "data.json", json.dumps(content, indent=1, ensure_ascii=False))

    def keep(self, source: Path, out: Path) -> None:
        """Write the sheet into `out`, unless the command was given one or `out` has it already."""
        if source.name != "data.json" and not (out / "data.json").exists():
            self.write(out)


def main(settings) -> None:
    """`calotype data`: write the sheet, or keep the one that is there."""
    file = settings.out / "data.json"
    if settings.fresh or not file.exists():
        make_sheet(settings.source, settings, settings.seed, PRESET_IMAGE_SIZE[settings.preset]).write(settings.out)
    sheet = read_sheet(file)
    if (sheet.source, sheet.seed) != (settings.source, settings.seed):
        raise UserError(
            f"--out {settings.out} holds the data sheet of {sheet.source} with --seed {sheet.seed}; "
            "give another --out, or --fresh."
        )
    _refuse_contradiction(sheet, settings, file)
    print(summary(sheet))


def open_sheet(source: str, settings: DataSettings, seed: int, out: Path, image_size: str) -> Sheet:
    """The sheet that `source` names (a data.json), the one that `out` holds of this source, or one made now.

    A new sheet is not written yet: the command may still find that it cannot work with it.
    """
    named = Path(source).name == "data.json"
    file = Path(source) if named else out / "data.json"
    if not file.exists() and not named:
        return make_sheet(source, settings, seed, image_size)
    sheet = read_sheet(file)
    if not named and sheet.source != source:
        raise UserError(f"--out {out} holds the data sheet of {sheet.source}, not {source}; give another --out.")
    _refuse_contradiction(sheet, settings, file)
    return sheet


def read_sheet(file: Path) -> Sheet:
    """A sheet from data.json and its manifest; raises UserError if they do not belong together."""
    try:
        sheet = Sheet(**json.loads(file.read_text(encoding="utf-8")))
        lines = file.with_name("manifest.jsonl").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); run `calotype data` again.") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is not a data sheet ({error}); run `calotype data` again.") from None
    if hashlib.sha256(lines.encode()).hexdigest() != sheet.manifest:
        raise UserError(f"{file.with_name('manifest.jsonl')} was changed since {file}; run `calotype data --fresh`.")
    sheet.records = [Record(*json.loads(line)) for line in lines.splitlines()]
    return sheet


def make_sheet(source: str, settings: DataSettings, seed: int, image_size: str) -> Sheet:
    """Read a source; unreadable files are left out and named, more than 1 in 100 raises UserError."""
    if source in VARIATIONS:
        if settings.val and fraction_of(settings.val) is None:
            raise UserError(f"--val {settings.val}: {source} has no folders; give a fraction such as 0.05.")
        found = _read_shapes(source, seed, fraction_of(settings.val) or _DEFAULT_FRACTION)
    elif ":" in source and not Path(source).exists():
        raise UserError(f"SOURCE {source} is not known; give `shapes`, `shapes:full` or a folder of pictures.")
    else:
        found = _read_folder(Path(source), settings)
    labels = Counter(record.label for record in found.records)
    sheet = Sheet(
        source=source,
        image_size=list(height_width(settings.image_size or image_size)),
        fit=settings.fit or "crop",
        channels=settings.channels or found.channels,
        seed=seed,
        counts={"train": sum(not r.val for r in found.records), "val": sum(r.val for r in found.records)},
        classes={name: labels[i] for i, name in enumerate(found.classes)},
        captions=any(r.text for r in found.records),
        sizes=found.sizes,
        bad_count=len(found.bad),
        bad=found.bad[:1000],
        root=found.root,
        val_root=found.val_root,
        val=settings.val or str(_DEFAULT_FRACTION),
        records=found.records,
    )
    for split, count in sheet.counts.items():
        if not count:
            raise UserError(f"SOURCE {source}: no picture is left to {_PURPOSES[split]}; add some, or change --val.")
    sheet.fingerprint = _fingerprint(sheet, found.hashes)
    return sheet


def refuse_flip(flip: bool, sheet: Sheet) -> None:
    """Raise UserError if mirror images would be wrong: a caption may say left or right."""
    if flip and (sheet.captions or sheet.source in VARIATIONS):
        raise UserError(
            f"--flip: the pictures of {sheet.source} have captions, wrong for a mirror image; leave it out."
        )


def summary(sheet: Sheet) -> str:
    """One sentence about a sheet."""
    height, width = sheet.image_size
    classes = f", {len(sheet.classes)} classes" if sheet.classes else ""
    bad = f", {sheet.bad_count} unreadable" if sheet.bad_count else ""
    return (
        f"{sheet.source}: {sheet.counts['train']:,} pictures to train on, {sheet.counts['val']:,} held out"
        f"{classes}{bad}; prepared as {height}x{width}, {'grey' if sheet.channels == 1 else 'colour'}."
    )


class _Found(NamedTuple):
    """What reading a source found."""

    records: list[Record]
    classes: list[str]
    channels: int
    sizes: dict[str, int]
    bad: list[dict[str, str]]
    hashes: list[str]
    root: str = ""
    val_root: str | None = None


def _read_shapes(source: str, seed: int, fraction: float) -> _Found:
    names = [str(i) for i in range(SHAPES_COUNT)]
    held_out = _held_out(names, fraction)
    factors = [shapes.draw_factors(seed, i, VARIATIONS[source]) for i in range(SHAPES_COUNT)]
    records = [Record(n, f.label, f.caption, val) for n, f, val in zip(names, factors, held_out, strict=True)]
    return _Found(records, list(shapes.CLASSES), 3, {}, [], [])


def _read_folder(root: Path, settings: DataSettings) -> _Found:
    fraction = fraction_of(settings.val) or _DEFAULT_FRACTION
    val_root = Path(settings.val) if settings.val and fraction_of(settings.val) is None else None
    if val_root and val_root.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--val {val_root} lies inside SOURCE {root}, so it would be trained on; move it outside.")
    train = _check(root, list_pictures(root))
    val = _check(val_root, list_pictures(val_root)) if val_root else []
    good, bad = [c for c in train + val if not c.fault], [c for c in train + val if c.fault]
    _refuse_many_bad(root, bad, len(train + val), settings.allow_bad)
    classes = sorted({c.entry.label for c in train if c.entry.label})
    _refuse_unknown_label(val_root, val, classes)
    number = {name: i for i, name in enumerate(classes)}
    in_train = sum(not c.fault for c in train)
    held_out = [False] * in_train if val_root else _held_out([c.entry.file for c in good], fraction)
    held_out += [True] * (len(good) - len(held_out))
    return _Found(
        records=[
            Record(c.entry.file, number.get(c.entry.label, UNLABELLED), c.entry.text, val)
            for c, val in zip(good, held_out, strict=True)
        ],
        classes=classes,
        channels=1 if all(c.grey for c in good) else 3,
        sizes=dict(Counter(f"{c.size[1]}x{c.size[0]}" for c in good).most_common(20)),
        bad=[{"file": c.entry.file, "reason": c.fault} for c in bad],
        hashes=[c.hash for c in good],
        root=str(root.resolve()),
        val_root=str(val_root.resolve()) if val_root else None,
    )


class _Checked(NamedTuple):
    """A file after the image gate: its fault, or what it holds."""

    entry: Entry
    fault: str = ""
    size: tuple[int, int] = (0, 0)
    grey: bool = True
    hash: str = ""


def _check(root: Path, entries: list[Entry]) -> list[_Checked]:
    """Decode every file once: only that finds the truncated ones before step 40,000 does."""

    def check(entry: Entry) -> _Checked:
        file = root / entry.file
        try:
            picture = load_image(file, channels=3, draft_size=512)
        except UnreadableImage as error:
            return _Checked(entry, fault=str(error))
        return _Checked(entry, "", header_size(file), _is_grey(picture), checkpoint.sha256(file))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(track(pool.map(check, entries), f"Reading {root}", len(entries), transient=True))


def _is_grey(picture: Image.Image) -> bool:
    rgb = np.asarray(picture)
    return bool((rgb == rgb[..., :1]).all())


def _held_out(names: list[str], fraction: float) -> list[bool]:
    """Which names are held out: by hash, so that a new file never moves an old one; at least one, never all."""
    score = [int.from_bytes(hashlib.blake2b(os.fsencode(n), digest_size=8).digest(), "big") / 2**64 for n in names]
    held = [s < fraction for s in score]
    if len(names) > 1 and sum(held) in (0, len(names)):
        lowest = score.index(min(score))
        held = [i == lowest for i in range(len(names))]
    return held


def _refuse_many_bad(root: Path, bad: list[_Checked], total: int, allow_bad: bool) -> None:
    if len(bad) == total:
        raise UserError(f"SOURCE {root}: none of its {total} files can be read; first: {bad[0].fault}.")
    if len(bad) > _BAD_SHARE * total and not allow_bad:
        raise UserError(
            f"SOURCE {root}: {len(bad)} of {total} files cannot be read, first {bad[0].fault}; "
            "mend them, or give --allow-bad to leave them out."
        )


def _refuse_unknown_label(val_root: Path | None, val: list[_Checked], classes: list[str]) -> None:
    known = set(classes)
    for checked in val:
        if checked.entry.label and checked.entry.label not in known:
            raise UserError(
                f"--val {val_root}: {checked.entry.file} has label {checked.entry.label!r}, which SOURCE does not have."
            )


def _refuse_contradiction(sheet: Sheet, settings: DataSettings, file: Path) -> None:
    asked = {
        "--image-size": settings.image_size and list(height_width(settings.image_size)),
        "--fit": settings.fit,
        "--channels": settings.channels,
        "--val": settings.val,
    }
    have = {"--image-size": sheet.image_size, "--fit": sheet.fit, "--channels": sheet.channels, "--val": sheet.val}
    for name, value in asked.items():
        if value is not None and value != have[name]:
            raise UserError(
                f"{name} {_shown(value)}: {file} was made with {_shown(have[name])}; make another with `calotype data`."
            )


def _shown(value) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _fingerprint(sheet: Sheet, hashes: list[str]) -> str:
    """A hash of everything that decides what training sees: content, labels, captions, split and preparation."""
    law = [sheet.source if sheet.source in VARIATIONS else "folder", sheet.seed if not sheet.root else 0]
    law += [sheet.image_size, sheet.fit, sheet.channels, hashes, sheet.records, list(sheet.classes)]
    return hashlib.sha256(json.dumps(law).encode()).hexdigest()
