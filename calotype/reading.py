"""What every reader of many files shares; it needs no torch."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from calotype.errors import UserError
from calotype.folder import Entry

BAD_SHARE = 0.01
_AT_ONCE = 4096  # files that wait for a thread
T, R = TypeVar("T"), TypeVar("R")


def each(function: Callable[[T], R], items: list[T]) -> Iterator[R]:
    """Results in the order of the items, from as many threads as there are cores."""
    waiting = iter(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while some := list(islice(waiting, _AT_ONCE)):
            yield from pool.map(function, some)


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def listing(entries: list[Entry]) -> str:
    """A hash of names, labels, captions and sizes: a fingerprint that no picture is read for."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr(tuple(entry)).encode("ascii", "backslashreplace"))
    return digest.hexdigest()


def refuse_many_bad(root: Path, faults: list[str], total: int, allow_bad: bool) -> None:
    """Raise UserError if more than 1 in 100 files cannot be read, or none can."""
    if len(faults) == total:
        raise UserError(f"SOURCE {root}: none of its {total} files can be read; first: {faults[0]}.")
    if len(faults) > BAD_SHARE * total and not allow_bad:
        raise UserError(
            f"SOURCE {root}: {len(faults)} of {total} files cannot be read, first {faults[0]}; "
            "mend them, or run with --allow-bad to leave them out."
        )
