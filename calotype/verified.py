"""Shards of a cache are checked against their SHA-256 once, and again when their file is another one or a week is over.

verified.json beside them holds what the file system said of each file when it was found whole: size, times of change
and number. Whoever writes into a file, or puts another in its place, changes one of these; the time of the last change
of a file (ctime) cannot be set back. Where nothing is known, or the note cannot be written, all is read as ever.
"""

import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from calotype.disk import sha256, write_text

_AGE = 7 * 24 * 3600.0  # seconds after which a disk may have lost bits without a word
_FRESH = 2.0  # seconds: a file that was changed so shortly before may change again within one tick of its clock


class Verified:
    """What is known of the files of one folder, in verified.json."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "verified.json"
        self.notes: dict[str, dict] = {}
        try:
            self.notes.update(json.loads(self.file.read_text()))
        except (OSError, ValueError, TypeError):
            return  # none yet, or unreadable: all are checked

    def first_fault(self, sums: dict[str, str]) -> tuple[str, str] | None:
        """The first file of these (name: SHA-256) that is missing or not what was written, and which of both.

        Several are read at a time.
        """
        began = time.time()
        unknown = [name for name, digest in sums.items() if not self._knows(name, digest, began)]
        before = [_look(self.folder / name) for name in unknown]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(_sha256_or_none, (self.folder / name for name in unknown)))
        for name, digest in zip(unknown, found, strict=True):
            if digest != sums[name]:
                return name, "is missing" if digest is None else "is damaged: it is not what was written"
        self._note(zip(unknown, before, found, strict=True), began)
        return None

    def _knows(self, name: str, digest: str, now: float) -> bool:
        note = self.notes.get(name)
        if not isinstance(note, dict) or note.get("sha256") != digest:
            return False
        at = note.get("at")
        young = isinstance(at, float) and 0 <= now - at < _AGE
        return young and note.get("file") == _look(self.folder / name)

    def _note(self, files: Iterable[tuple[str, list[int] | None, str | None]], began: float) -> None:
        settled = {
            name: {"sha256": digest, "file": look, "at": began}
            for name, look, digest in files
            if look and began - max(look[1:3]) / 1e9 > _FRESH
        }
        if not settled:
            return
        self.notes |= settled
        try:
            write_text(self.file, json.dumps(self.notes, indent=1))
        except OSError:
            return  # a folder that is read only, or a full disk: the next start checks again


def _look(file: Path) -> list[int] | None:
    """Size, times of change in nanoseconds, and number of a file; None where there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _sha256_or_none(file: Path) -> str | None:
    try:
        return sha256(file)
    except OSError:
        return None
