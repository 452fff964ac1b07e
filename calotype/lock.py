"""One process at a time in a folder; the lock dies with its process."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from calotype.errors import UserError


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold the folder, made if need be; raises UserError naming the process that holds it."""
    out.mkdir(parents=True, exist_ok=True)
    holder = out / ".holder"
    try:
        with FileLock(out / ".lock", timeout=0):
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
    except Timeout:
        who = holder.read_text() if holder.exists() else "another process"
        raise UserError(f"--out {out} is in use by {who}; wait for it, or give another --out.") from None
