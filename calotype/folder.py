"""What a folder of pictures holds: files, labels and captions, in an order that no locale or disk changes."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from calotype.errors import UserError

SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".avif"])
METADATA = ("metadata.jsonl", "metadata.csv")


class Entry(NamedTuple):
    """A picture found in a folder: path relative to it, class name or "", caption or ""."""

    file: str
    label: str
    text: str


def list_pictures(root: Path) -> list[Entry]:
    """The pictures below `root`: by metadata file, else one sub-folder a class, else flat; raises UserError."""
    if not root.is_dir():
        raise UserError(f"SOURCE {root} is not a folder; give a folder of pictures, or `shapes`.")
    for name in METADATA:
        if (root / name).is_file():
            return _from_metadata(root, root / name)
    entries = [_entry(root, path) for path in _picture_files(root)]
    if not entries:
        raise UserError(f"SOURCE {root} holds no pictures ({' '.join(sorted(SUFFIXES))}); give another folder.")
    loose = [entry.file for entry in entries if not entry.label]
    if loose and len(loose) < len(entries):
        raise UserError(
            f"SOURCE {root}: {len(loose)} pictures such as {loose[0]} lie beside the class folders; move them into one."
        )
    return entries


def _entry(root: Path, path: Path) -> Entry:
    relative = path.relative_to(root)
    caption = path.with_suffix(".txt")
    text = caption.read_text(encoding="utf-8", errors="replace").strip() if caption.is_file() else ""
    return Entry(relative.as_posix(), relative.parts[0] if len(relative.parts) > 1 else "", text)


def _picture_files(root: Path) -> list[Path]:
    """Picture files by path, without hidden ones and archive debris; each inode once, links followed once."""
    seen: set[tuple[int, int]] = set()
    return [path for path in _walk(root, seen) if path.suffix.lower() in SUFFIXES and _is_new(path, seen)]


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Every visible file below a folder, sorted by code point; a folder that was seen before is not entered."""
    if not _is_new(folder, seen):
        return
    with os.scandir(folder) as scan:
        children = sorted((child for child in scan if _is_visible(child.name)), key=lambda child: child.name)
    for child in children:
        if child.is_dir():
            yield from _walk(Path(child.path), seen)
        else:
            yield Path(child.path)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _is_new(path: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether this (device, inode) was not met before; dangling links count as new, the image gate names them."""
    try:
        status = path.stat()
    except OSError:
        return True
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        return False
    seen.add(identity)
    return True


def _from_metadata(root: Path, file: Path) -> list[Entry]:
    entries = []
    for number, row in _rows(file):
        name = row.get("file_name")
        if not name or not isinstance(name, str):
            raise UserError(f"{file}, line {number}: no file_name; every line needs one.")
        if not (root / name).resolve().is_relative_to(root.resolve()):
            raise UserError(f"{file}, line {number}: {name} lies outside {root}; move it inside.")
        entries.append(Entry(name, _text(row.get("label")), _text(row.get("text"))))
    if not entries:
        raise UserError(f"{file} names no pictures; fill it or remove it.")
    unlabelled = next((entry.file for entry in entries if not entry.label), None)
    if unlabelled and any(entry.label for entry in entries):
        raise UserError(f"{file}: {unlabelled} has no label but others have; label all or none.")
    return sorted(entries)


def _text(value) -> str:
    """A label may be the number 0; what is missing is the empty text."""
    return "" if value is None else str(value)


def _rows(file: Path) -> Iterator[tuple[int, dict]]:
    """Line numbers and rows of a metadata file; raises UserError where it is not UTF-8 or no table."""
    try:
        yield from _lines(file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({error}); save it as UTF-8.") from None


def _lines(file: Path) -> Iterator[tuple[int, dict]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        if file.suffix == ".csv":
            yield from enumerate(csv.DictReader(stream), start=2)
            return
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, _parsed(line, file, number)


def _parsed(line: str, file: Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{file}, line {number} is not JSON ({error}).") from None
    if not isinstance(row, dict):
        raise UserError(f"{file}, line {number} is not an object with file_name, label and text.")
    return row
