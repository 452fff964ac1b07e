"""What a folder of pictures holds: files, labels and captions, in an order that no locale or disk changes."""

import csv
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from calotype.errors import UserError
from calotype.picture_files import display_name

SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".avif"])
METADATA = ("metadata.jsonl", "metadata.csv")
_MOST_CAPTION = 65_536  # bytes


class Entry(NamedTuple):
    """A picture found in a folder: path relative to it, class name or "", caption or "", and its size in bytes."""

    file: str
    label: str
    text: str
    bytes: int = 0


class Status(NamedTuple):
    """What the disk says of a file or folder."""

    kind: int  # stat.S_IFREG and so on
    bytes: int
    touched: int  # nanoseconds: when its content or its name last changed
    identity: tuple[int, int]  # device and inode


class Survey(NamedTuple):
    """All that was seen in a folder."""

    entries: list[Entry]
    links: list[tuple[str, str]]  # pictures that were left out, and the one that is the same file on the disk
    files: dict[str, Status | None]  # every visible file, whatever it is; None: a link to nothing, or in a circle
    folders: list[str]  # those directly in it


def list_pictures(root: Path) -> list[Entry]:
    """The pictures below `root`: by metadata file, else one sub-folder a class, else flat; raises UserError."""
    return survey(root).entries


def survey(root: Path) -> Survey:
    """Look through a folder, without opening a picture; raises UserError where it cannot be trained on."""
    if not root.is_dir():
        what = "is a file, not a folder; unpack it, or" if root.is_file() else "is not a folder;"
        raise UserError(f"SOURCE {root} {what} give a folder of pictures, or `shapes`.")
    walked = _Walk(root)
    metadata = next((root / name for name in METADATA if (root / name).is_file()), None)
    entries = _from_metadata(root, metadata) if metadata else [walked.entry(name) for name in walked.pictures]
    if not entries:
        raise UserError(f"SOURCE {root} holds no pictures ({' '.join(sorted(SUFFIXES))}); give another folder.")
    if not metadata:
        _refuse_mixture(root, entries)
    return Survey(entries, walked.links, walked.files, walked.folders)


def on_disk(root: Path, file: str) -> Path:
    """Where a picture lies: names are kept as UTF-8 reads them, whatever the locale's encoding is."""
    return root / os.fsdecode(file.encode("utf-8", _ERRORS))


_ERRORS = sys.getfilesystemencodeerrors()


def _portable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", _ERRORS)


class _Walk:
    """Every visible file below a folder by path, names sorted by code point; each inode once, links followed once."""

    def __init__(self, root: Path):
        self.root = root
        self.files: dict[str, Status | None] = {}
        self.folders: list[str] = []
        self.pictures: list[str] = []
        self.links: list[tuple[str, str]] = []
        seen: dict[tuple[int, int], str] = {}
        waiting = [""]
        while waiting:
            name = waiting.pop()
            status = _status(on_disk(root, name))
            if status and status.kind == stat.S_IFDIR:
                if _first(status, name, seen) == name:  # a loop of links leads nowhere new
                    waiting += reversed(self._children(name))
                    self.folders += [name] if name and "/" not in name else []
            else:
                self._add(name, status, seen)

    def _children(self, folder: str) -> list[str]:
        try:
            with os.scandir(on_disk(self.root, folder)) as scan:
                names = sorted(_portable(child.name) for child in scan)
        except OSError as error:
            where = display_name(on_disk(self.root, folder))
            raise UserError(f"{where} cannot be listed ({error.strerror}); change its permissions.") from None
        prefix = f"{folder}/" if folder else ""
        return [prefix + name for name in names if _is_visible(name)]

    def _add(self, name: str, status: Status | None, seen: dict[tuple[int, int], str]) -> None:
        self.files[name] = status
        if os.path.splitext(name)[1].lower() not in SUFFIXES:
            return
        first = _first(status, name, seen) if status else name  # the image gate names dangling links
        if first == name:
            self.pictures.append(name)
        else:
            self.links.append((name, first))

    def entry(self, name: str) -> Entry:
        """A picture with the name of its class, and the caption that lies beside it."""
        status, folder = self.files[name], name.partition("/")[0] if "/" in name else ""
        return Entry(name, _class_name(self.root, folder), self._caption(name), status.bytes if status else 0)

    def _caption(self, name: str) -> str:
        beside = os.path.splitext(name)[0] + ".txt"
        status = self.files.get(beside)
        if not status or status.kind != stat.S_IFREG:
            return ""
        with on_disk(self.root, beside).open("rb") as stream:
            return stream.read(_MOST_CAPTION).decode("utf-8-sig", errors="replace").strip()


def _status(path: Path) -> Status | None:
    try:
        found = path.stat()
    except OSError:
        return None
    touched = max(found.st_mtime_ns, found.st_ctime_ns)
    return Status(stat.S_IFMT(found.st_mode), found.st_size, touched, (found.st_dev, found.st_ino))


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _first(status: Status, name: str, seen: dict[tuple[int, int], str]) -> str:
    """The name under which this (device, inode) was met first."""
    return seen.setdefault(status.identity, name)


def _class_name(root: Path, folder: str) -> str:
    """A class travels in JSON and in models, so its name must be text."""
    try:
        folder.encode()
    except UnicodeEncodeError:
        raise UserError(f"SOURCE {root}: the name of folder {folder!r} is not UTF-8; rename it.") from None
    return folder


def _refuse_mixture(root: Path, entries: list[Entry]) -> None:
    loose = [entry.file for entry in entries if not entry.label]
    if loose and len(loose) < len(entries):
        raise UserError(
            f"SOURCE {root}: {len(loose)} pictures such as {display_name(loose[0])} lie beside the class folders; "
            "move them into one."
        )


def _from_metadata(root: Path, file: Path) -> list[Entry]:
    entries: dict[str, Entry] = {}
    inside = root.resolve()
    for number, row in _rows(file):
        entry = _row_entry(root, inside, row, f"{file}, line {number}")
        if entry.file in entries:
            raise UserError(f"{file}, line {number}: {display_name(entry.file)} is named twice; keep one line of it.")
        entries[entry.file] = entry
    if not entries:
        raise UserError(f"{file} names no pictures; fill it or remove it.")
    unlabelled = next((entry.file for entry in entries.values() if not entry.label), None)
    if unlabelled and any(entry.label for entry in entries.values()):
        raise UserError(f"{file}: {display_name(unlabelled)} has no label but others have; label all or none.")
    return sorted(entries.values())


def _row_entry(root: Path, inside: Path, row: dict, where: str) -> Entry:
    name = row.get("file_name")
    if not name or not isinstance(name, str) or "\0" in name:
        raise UserError(f"{where}: no file_name; every line needs one.")
    path = on_disk(root, name)
    try:
        outside = not path.resolve().is_relative_to(inside)
    except (OSError, RuntimeError):  # links in a circle: the image gate names them
        outside = False
    if outside:
        raise UserError(f"{where}: {display_name(name)} lies outside {root}; move it inside.")
    status = _status(path)
    label, text = _text(row.get("label"), where), _text(row.get("text"), where)
    return Entry(name, label, text, status.bytes if status else 0)


def _text(value, where: str) -> str:
    """A label may be the number 0; what is missing is the empty text."""
    if isinstance(value, dict | list):
        raise UserError(f"{where}: {display_name(str(value)[:60])} is neither a text nor a number.")
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
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}, line {number} is not JSON ({error}); mend that line.") from None
    if not isinstance(row, dict):
        raise UserError(f"{file}, line {number} is not an object with file_name, label and text.")
    return row
