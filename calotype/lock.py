"""One process at a time in a folder; the lock dies with its process."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from calotype.disk import make_folder
from calotype.errors import UserError

_LOCK, _HOLDER = ".lock", ".holder"


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold the folder, made if need be; raises UserError naming the process that holds it."""
    make_folder(out)
    try:
        with FileLock(out / _LOCK, timeout=0):
            (out / _HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
    except Timeout:
        raise UserError(_in_use(out)) from None


def refuse_held(out: Path) -> None:
    """Raise UserError if another process holds the folder, without waiting for anything heavy to be imported."""
    if int(os.environ.get("RANK", 0)) or not (out / _LOCK).exists():  # the first of several processes holds it for all
        return
    try:
        with FileLock(out / _LOCK, timeout=0):
            return
    except Timeout:
        raise UserError(_in_use(out)) from None
    except OSError:
        return  # a folder that cannot be written to says so itself, later


def _in_use(out: Path) -> str:
    try:
        who = (out / _HOLDER).read_text()
    except OSError:
        who = "another process"
    return f"--out {out} is in use by {who}; wait for it, or give another --out."
