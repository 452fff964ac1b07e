"""`calotype doctor`: whether a folder is a safe place for a run."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from calotype.finding import Finding, examine

MB = 2**20
_LEAST, _COMFORTABLE = 500 * MB, 5_000 * MB
_WRITTEN, _CHUNK, _LONGEST = 64 * MB, 4 * MB, 3.0  # bytes, bytes, seconds
_SLOW = 20.0  # MB a second
_CHECKPOINT = 300  # MB; about that of preset base
_RENAMES = 200
_REMOTE = frozenset("nfs nfs4 cifs smb smb2 smb3 smbfs afs 9p ceph lustre gpfs beegfs glusterfs vboxsf drvfs".split())
_ANOTHER = "Give --out a folder on another disk."
_HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1], timeout=0):
    print("held", flush=True)
    sys.stdin.read()
"""


def examine_disk(place: Path) -> list[Finding]:
    """All examinations of the file system that the (empty) folder `place` lies on."""
    examinations = {
        "Free space": free_space,
        "Writing": writing,
        "Renaming": renaming,
        "Locks": locks,
        "File names": names,
    }
    return [finding for what, of in examinations.items() for finding in examine(what, partial(of, place))]


def free_space(place: Path) -> Finding:
    """Bytes and, where the file system counts them, files that are left."""
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:,.1f} GB free"
    if hasattr(os, "statvfs"):
        status = os.statvfs(place)
        if status.f_files and status.f_favail < 10_000:
            return Finding("Free space", "FAIL", f"room for only {status.f_favail:,} more files", _ANOTHER)
    if free < _LEAST:
        return Finding("Free space", "FAIL", text, f"A small run needs 0.5 GB. Free some, or: {_ANOTHER}")
    if free < _COMFORTABLE:
        return Finding("Free space", "note", f"{text}: enough for a small run; a large one keeps several GB")
    return Finding("Free space", "pass", text)


def writing(place: Path) -> Finding:
    """A file is written, brought to the disk, and read again."""
    file, chunk = place / "writing", os.urandom(_CHUNK)
    began, written = time.monotonic(), 0
    try:
        with file.open("wb") as stream:
            while written < _WRITTEN and time.monotonic() - began < _LONGEST:
                written += stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        rate = written / MB / (time.monotonic() - began)
        with file.open("rb") as stream:
            if any(part != chunk for part in iter(lambda: stream.read(_CHUNK), b"")):
                return Finding("Writing", "FAIL", "what was read is not what was written", _ANOTHER)
    except OSError as error:
        way_out = f"A limit on file sizes (ulimit -f) or a quota may be set. Lift it, or: {_ANOTHER}"
        return Finding("Writing", "FAIL", f"{written // MB} MB, then: {error.strerror}", way_out)
    finally:
        file.unlink(missing_ok=True)
    return _speed(rate)


def _speed(rate: float) -> Finding:
    text = f"{rate:,.0f} MB a second, to the disk and not only to memory"
    if rate < _SLOW:
        slow = f"{text}: a checkpoint of {_CHECKPOINT} MB takes {_CHECKPOINT / rate:,.0f} s"
        return Finding("Writing", "note", slow, "Raise --checkpoint-every, or give --out a faster disk.")
    return Finding("Writing", "pass", text)


def renaming(place: Path) -> Finding:
    """A file is replaced again and again while another thread reads it: always the old or the new one, and whole."""
    file, texts = place / "renamed", [b"a" * 65_536, b"b" * 65_536]
    file.write_bytes(texts[0])
    torn: list[int] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen = file.read_bytes() if file.exists() else b""
            if seen not in texts:
                torn.append(len(seen))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for i in range(_RENAMES):
            (place / "new").write_bytes(texts[i % 2])
            (place / "new").replace(file)
    finally:
        stop.set()
        reader.join()
    if torn:
        return Finding("Renaming", "FAIL", f"not atomic: a reader met {len(torn)} torn or missing files", _ANOTHER)
    return _renamed_folder(place)


def _renamed_folder(place: Path) -> Finding:
    """As a checkpoint is published: a folder gets its name, and its parent is brought to the disk."""
    (place / "folder").mkdir()
    (place / "folder").rename(place / "published")
    if os.name != "nt":
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            found = f"atomic, but a folder cannot be brought to the disk ({error.strerror})"
            return Finding("Renaming", "note", found, f"A power cut may lose the newest checkpoint. {_ANOTHER}")
        finally:
            os.close(descriptor)
    return Finding("Renaming", "pass", f"atomic: {_RENAMES} replacements under a reader's eyes, and a folder's")


def locks(place: Path) -> Finding:
    """Another process holds a lock; ours is refused until that one is killed."""
    file = place / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        if holder.stdout.readline().strip() != "held":
            return Finding("Locks", "FAIL", "a lock cannot be taken here", _ANOTHER)
        refused = not _taken(file, 0)
    finally:
        holder.kill()
        holder.communicate()
    if not refused:
        return Finding("Locks", "FAIL", "two processes hold the same lock", f"They would mix their runs. {_ANOTHER}")
    if not _taken(file, 2):
        return Finding("Locks", "FAIL", "a killed process keeps its lock", _ANOTHER)
    return _by_kind(place)


def _taken(file: Path, timeout: float) -> bool:
    try:
        with FileLock(file, timeout=timeout):
            return True
    except Timeout:
        return False


def _by_kind(place: Path) -> Finding:
    kind = file_system(place)
    if kind in _REMOTE or kind.startswith("fuse"):
        found = f"they work between processes of this machine; the file system is {kind}"
        way_out = "Between machines its locks may not count: let only one of them write to a run."
        return Finding("Locks", "note", found, way_out)
    found = f"the file system is {kind}" if kind else "the kind of file system is not known"
    return Finding("Locks", "pass", f"one holder at a time, and free when it is killed; {found}")


def file_system(place: Path) -> str:
    """The kind of file system that a path lies on, such as ext4; empty where that cannot be told."""
    path = place.resolve()
    try:
        mounts = [(Path(part.mountpoint), part.fstype) for part in psutil.disk_partitions(all=True)]
    except (OSError, RuntimeError):
        return ""
    around = [(len(point.parts), kind) for point, kind in mounts if path.is_relative_to(point)]
    return max(around, key=lambda pair: pair[0], default=(0, ""))[1].lower()


def names(place: Path) -> Iterator[Finding]:
    """Names of files in other alphabets, and the encodings that Python was told."""
    name = "Größe 画像 é.png"
    try:
        (place / name).touch()
        kept = name in os.listdir(place)
    except (OSError, UnicodeError) as error:
        yield Finding("File names", "FAIL", f"{ascii(name)} is refused ({error})", "Set LC_ALL=C.UTF-8.")
        return
    spoken = getattr(sys.__stdout__, "encoding", None) or "utf-8"  # sys.stdout may be a status line's
    if not kept:
        yield Finding("File names", "note", "the file system changes the form of accented letters")
    elif spoken.lower().replace("-", "") != "utf8":
        found = f"kept as they are; but output is in {spoken}, where other letters become question marks"
        yield Finding("File names", "note", found, "Set LC_ALL=C.UTF-8, or PYTHONUTF8=1.")
    else:
        yield Finding("File names", "pass", "kept as they are, accents and other alphabets too")
