"""The folder of visitors' files: what lies in it, and how it stays small."""

import asyncio
import contextlib
import os
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import anyio.to_thread

MOST_CACHED = 512_000_000  # bytes of all files
MOST_FILES = 20_000
SWEEP_SECONDS = 10


class Cache:
    """A folder of at most `most` bytes and MOST_FILES files; beyond that the oldest go."""

    def __init__(self, folder: Path, most: int = MOST_CACHED):
        self.folder, self.most = Path(os.path.realpath(folder)), most
        self._lock = threading.Lock()

    def holds(self, path: str) -> bool:
        """Whether this is the absolute path of an ordinary file in the folder, with no link on the way."""
        inside = path.startswith(f"{self.folder}{os.sep}") and "\0" not in path and os.path.normpath(path) == path
        try:
            return inside and os.path.realpath(path) == path and stat.S_ISREG(os.lstat(path).st_mode)
        except OSError:  # such as a name that is too long
            return False

    def make_room(self, size: int = 0) -> int:
        """Delete the oldest files until `size` more bytes would fit; the bytes of those that stay."""
        with self._lock:
            files = sorted(self._files())
            total = sum(bytes for _, bytes, _ in files)
            for i, (_, bytes, path) in enumerate(files):
                if total + size <= self.most and len(files) - i <= MOST_FILES:
                    break
                _remove(path)
                total -= bytes
            return total

    def _files(self) -> list[tuple[int, int, str]]:
        """When each file changed, its size, and where it is."""
        found = []
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):  # deleted a moment ago
                    status = os.lstat(path)
                    found.append((status.st_mtime_ns, status.st_size, path))
        return found

    @contextlib.asynccontextmanager
    async def kept_small(self, app=None) -> AsyncIterator[None]:
        """While this lasts, look after the size every few seconds."""
        task = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _sweep(self) -> None:
        while True:
            await anyio.to_thread.run_sync(self.make_room)
            await asyncio.sleep(SWEEP_SECONDS)


def _remove(path: str) -> None:
    """Delete a file, and its folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        os.unlink(path)
        os.rmdir(os.path.dirname(path))
