"""Image sources, the embedded shapes or a folder, and their data sheet.

A source is read once. What was found goes into data.json (the sheet) and manifest.jsonl (a line a picture); later
commands take the sheet as their SOURCE. Those that train compare the folder with it before they begin.
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from calotype import checkpoint
from calotype.config import PRESET_IMAGE_SIZE, DataSettings, fraction_of, height_width
from calotype.data_change import changes, refuse_changed
from calotype.errors import UserError
from calotype.prepared import Prepared
from calotype.source import DEFAULT_FRACTION, VARIATIONS, Record, read_folder, read_shapes

_PURPOSES = {"train": "train on", "val": "hold out"}


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
    bad: list[dict]
    manifest: str = ""
    listing: str = ""  # what `calotype data check` calls the fingerprint of the folder
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    val_root: str | None = None
    records: list[Record] = field(default_factory=list, repr=False)
    file: Path | None = None  # where it was read from; None: made just now
    prepared = None  # of a sheet made just now the pictures, as far as memory allows; no field, for it is not written

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
        content = {k: v for k, v in asdict(self).items() if k not in ("records", "file")}
        checkpoint.write_text(out / "data.json", _json(content))
        for note in self.notes:
            print(note)

    def keep(self, source: Path, out: Path) -> None:
        """Write the sheet into `out`, unless the command was given one or `out` has it already."""
        if source.name != "data.json" and not (out / "data.json").exists():
            self.write(out)


def main(settings) -> None:
    """`calotype data`: write the sheet, or keep the one that is there."""
    file = settings.out / "data.json"
    if settings.fresh or not file.exists():
        _make(settings)
    sheet = read_sheet(file)
    if (sheet.source, sheet.seed) != (settings.source, settings.seed):
        raise UserError(
            f"--out {settings.out} holds the data sheet of {sheet.source} with --seed {sheet.seed}; "
            "give another --out, or --fresh."
        )
    _refuse_contradiction(sheet, settings, file)
    if changes(sheet):
        refuse_changed(sheet, allowed=settings.allow_data_change)
        sheet = _make(settings)
    print(summary(sheet))


def _make(settings) -> Sheet:
    sheet = make_sheet(settings.source, settings, settings.seed, PRESET_IMAGE_SIZE[settings.preset])
    sheet.write(settings.out)
    return sheet


def open_sheet(source: str, settings: DataSettings, seed: int, out: Path, image_size: str) -> Sheet:
    """The sheet that `source` names (a data.json), the one that `out` holds of this source, or one made now.

    A new sheet is not written yet: the command may still find that it cannot work with it.
    """
    named = Path(source).name == "data.json"
    file = Path(source) if named else out / "data.json"
    if not file.exists() and not named:
        return make_sheet(source, settings, seed, image_size, keep=True)
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
    sheet.file = file
    return sheet


def make_sheet(source: str, settings: DataSettings, seed: int, image_size: str, keep: bool = False) -> Sheet:
    """Read a source; unreadable files are left out and named, more than 1 in 100 raises UserError.

    With `keep` the pictures are kept too, for who is going to need them.
    """
    size, fit = height_width(settings.image_size or image_size), settings.fit or "crop"
    prepared = Prepared(size, fit) if keep else None
    if source in VARIATIONS:
        if settings.val and fraction_of(settings.val) is None:
            raise UserError(f"--val {settings.val}: {source} has no folders; give a fraction such as 0.05.")
        found = read_shapes(source, seed, fraction_of(settings.val) or DEFAULT_FRACTION)
    elif ":" in source and not Path(source).exists():
        raise UserError(f"SOURCE {source} is not known; give `shapes`, `shapes:full` or a folder of pictures.")
    else:
        found = read_folder(Path(source), settings, prepared)
    labels = Counter(record.label for record in found.records)
    sheet = Sheet(
        source=source,
        image_size=list(size),
        fit=fit,
        channels=settings.channels or found.channels,
        seed=seed,
        counts={"train": sum(not r.val for r in found.records), "val": sum(r.val for r in found.records)},
        classes={name: labels[i] for i, name in enumerate(found.classes)},
        captions=any(r.text for r in found.records),
        sizes=found.sizes,
        bad_count=len(found.bad),
        bad=found.bad,
        listing=found.listing,
        notes=list(found.notes),
        root=found.root,
        val_root=found.val_root,
        val=settings.val or str(DEFAULT_FRACTION),
        records=found.records,
    )
    if sheet.channels in (3, found.channels):
        sheet.prepared = prepared
    for split, count in sheet.counts.items():
        if not count:
            raise UserError(f"SOURCE {source}: no picture is left to {_PURPOSES[split]}; add some, or change --val.")
    sheet.fingerprint = _fingerprint(sheet)
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


def _fingerprint(sheet: Sheet) -> str:
    """A hash of everything that decides what training sees: content, labels, captions, split and preparation."""
    law = [sheet.source if sheet.source in VARIATIONS else "folder", sheet.seed if not sheet.root else 0]
    hashes, records = [r.sha256 for r in sheet.records if r.sha256], [r[:4] for r in sheet.records]
    law += [sheet.image_size, sheet.fit, sheet.channels, hashes, records, list(sheet.classes)]
    return hashlib.sha256(json.dumps(law).encode()).hexdigest()


def _json(content: dict) -> str:
    """JSON to be read by people, but for names that are no text."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(content, indent=1)
    return text
