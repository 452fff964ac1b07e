"""What must reach the disk, in which order: the files, their folder, the new name, and only then the old one goes.

A crash or a power cut at any instant leaves the old content or the new one, whole.
"""

import ctypes
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TextIO

from calotype.errors import UserError, is_disk_full

_SPARE = 1.2  # free space over what is to be written
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}  # of folders, on some network disks
_AT_FDCWD, _SWAP = -100, 2  # of renameat2 on Linux; macOS counts its flag the same


class DiskFull(UserError):
    """There is no room for what was to be written; what was there before is as it was."""


def publish(temporary: Path, final: Path) -> None:
    """Bring a finished folder to the disk and give it its name in one atomic step, replacing an older one.

    Where the system cannot swap two names the older one lies beside it as .NAME.old for the instant between two steps.
    """
    for path in [*files_of(temporary), *[p for p in temporary.rglob("*") if p.is_dir()], temporary]:
        sync(path)
    replaced = final.with_name(f".{final.name}.old")
    if not final.exists():
        temporary.rename(final)
    elif swap(temporary, final):
        shutil.rmtree(replaced, ignore_errors=True)
        temporary.rename(replaced)
    else:
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        temporary.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def swap(one: Path, other: Path) -> bool:
    """Let two folders trade names in one atomic step; returns whether the system could."""
    names = os.fsencode(one), os.fsencode(other)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(*names, _SWAP) == 0
        return libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _SWAP) == 0
    except (AttributeError, OSError, TypeError):  # another system, or an old C library
        return False


def write_text(file: Path, text: str) -> None:
    """Write a small file so that readers see the old text or the new one, never a part."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    rename_file(temporary, file)


def rename_file(temporary: Path, file: Path) -> None:
    """Bring a finished file to the disk and give it its name, replacing an older one."""
    sync(temporary)
    temporary.replace(file)
    sync(file.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that a power cut takes none of their names away."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if os.name == "nt":  # Windows syncs neither a folder nor a file that is open for reading
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _CANNOT_SYNC):
            raise


def refuse_full(folder: Path, need: int) -> None:
    """Raise DiskFull unless there is room for `need` bytes and a fifth more."""
    free = shutil.disk_usage(folder).free
    if free < _SPARE * need:
        raise DiskFull(f"{free / 2**20:.1f} MiB free, {_SPARE * need / 2**20:.1f} MiB wanted")


@contextmanager
def unless_full(say: Callable[[str], None], what: Path) -> Iterator[None]:
    """Go without something that a full disk does not take, and say so."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        say(f"no space left for {what}; the run goes on without.")


@contextmanager
def lines_as_room_allows() -> Iterator[None]:
    """What is printed into a file on a full disk is lost; it does not end the run."""
    if sys.stdout.isatty():
        yield
        return
    with redirect_stdout(_AsRoomAllows(sys.stdout)):
        yield


class _AsRoomAllows:
    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _if_room():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _if_room():
            self._stream.flush()


@contextmanager
def _if_room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise


def files_of(folder: Path) -> list[Path]:
    """All files in a folder and those below, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
