"""A model of power loss: real file operations are recorded, and then what a disk may have kept of them is played back.

Nothing is kept for certain but what was synced: a file's content by its own fsync, a name by the fsync of its folder.
What was not may be there, or not, or in part, in any order.
"""

import itertools
import os
import random
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from calotype import disk

MODES = ("whole", "synced", "half", "zeros")  # what may be left of content that was not synced
_MOST_SUBSETS = 4  # pending changes of names up to which every subset is tried; beyond, prefixes and some others


class Change(NamedTuple):
    """Names that a folder gains or loses in one atomic step: (folder, name, node or None)."""

    names: tuple[tuple[int, str, int | None], ...]


class Write(NamedTuple):
    """New content of a file."""

    node: int
    content: bytes


class Sync(NamedTuple):
    """fsync of a file or a folder."""

    node: int


class Ack(NamedTuple):
    """The caller was told that this is safe."""

    what: object


class Recorder:
    """Records what happens to the names and files in a folder, whoever writes them; `with recorder.on():`."""

    def __init__(self, root: Path):
        self.root, self.log = root.resolve(), []
        self.nodes: dict[Path, int] = {self.root: 0}
        self.content: dict[int, bytes] = {}
        self.count = 0

    @contextmanager
    def on(self):
        """Watch the calls that change names or sync; files are looked at before and after each."""
        watched = {(os, n): getattr(self, f"_{n}") for n in ("mkdir", "rename", "unlink", "rmdir", "fsync")}
        watched |= {(os, "replace"): self._rename, (os, "remove"): self._unlink, (disk, "swap"): self._swap}
        earlier = {key: getattr(*key) for key in watched}
        try:
            for (module, name), note in watched.items():
                setattr(module, name, self._around(earlier[module, name], note))
            yield
        finally:
            for (module, name), call in earlier.items():
                setattr(module, name, call)
        self.look()

    def ack(self, what) -> None:
        """Note what the caller may now rely on."""
        self.look()
        self.log.append(Ack(what))

    def look(self) -> None:
        """Note files that are new or have new content; every other change of names must have been seen."""
        there = set(self.root.rglob("*"))
        assert all(path.is_file() for path in there - self.nodes.keys()), "a folder came unseen"
        assert self.nodes.keys() - there == {self.root}, "a name went unseen"
        for path in sorted(there):
            if path.is_dir():
                continue
            if path not in self.nodes:
                node = self._new(path)
                self.log.append(Write(node, b""))
                self._change((path, node))
            content = path.read_bytes()
            if self.content.get(self.nodes[path]) != content:
                self.content[self.nodes[path]] = content
                self.log.append(Write(self.nodes[path], content))

    def _around(self, call, note):
        def watched(*inputs, **more):
            self.look()
            result = call(*inputs, **more)
            note(result, *inputs, **more)
            return result

        return watched

    def _path(self, path, dir_fd=None) -> Path:
        """An absolute path, whatever it is relative to; an open file counts by its name."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
        return Path(base, os.fsdecode(path))

    def _new(self, path: Path) -> int:
        self.count += 1
        self.nodes[path] = self.count
        return self.count

    def _change(self, *pairs: tuple[Path, int | None]) -> None:
        self.log.append(Change(tuple((self.nodes[path.parent], path.name, node) for path, node in pairs)))

    def _mkdir(self, _, path, *_more, dir_fd=None, **_named) -> None:
        if (path := self._path(path, dir_fd)).is_relative_to(self.root):
            self._change((path, self._new(path)))

    def _unlink(self, _, path, *, dir_fd=None) -> None:
        if (path := self._path(path, dir_fd)) in self.nodes:
            self._change((path, None))
            del self.nodes[path]

    _rmdir = _unlink

    def _rename(self, _, source, target, **_named) -> None:
        source, target = self._path(source), self._path(target)
        if source in self.nodes:
            self._change((source, None), (target, self.nodes[source]))
            self.nodes.pop(target, None)
            self._move({source: target})

    def _swap(self, done, one, other) -> None:
        if done and one in self.nodes:
            self._change((one, self.nodes[other]), (other, self.nodes[one]))
            self._move({one: other, other: one})

    def _move(self, places: dict[Path, Path]) -> None:
        moved = {}
        for path, node in self.nodes.items():
            old = next((old for old in places if path.is_relative_to(old)), None)
            moved[places[old] / path.relative_to(old) if old else path] = node
        gone = [path for path in self.nodes if path not in moved]
        assert all(any(path.is_relative_to(old) for old in places) for path in gone)
        self.nodes = moved

    def _fsync(self, _, descriptor) -> None:
        if (path := self._path(descriptor)) in self.nodes:
            self.log.append(Sync(self.nodes[path]))


class State(NamedTuple):
    """What a disk holds after a power cut, by path, None for folders; and what had been acknowledged."""

    files: dict[Path, bytes | None]
    acknowledged: list

    def write(self, folder: Path) -> Path:
        """Make it real."""
        folder.mkdir()
        for path, content in sorted(self.files.items()):
            (folder / path).mkdir() if content is None else (folder / path).write_bytes(content)
        return folder


def states(log: list, seed: int = 0) -> list[State]:
    """All that may be left if the power goes after any of the operations; every state once for what was known then."""
    rng, seen, found = random.Random(seed), set(), []
    for end in range(len(log) + 1):
        done = log[:end]
        acknowledged = [entry.what for entry in done if isinstance(entry, Ack)]
        pending = _pending(done)
        for chosen in _choices(pending, rng):
            tree = _tree(done, set(pending) - chosen)
            for mode in MODES:
                files = _files(tree, _contents(done, mode))
                key = (len(acknowledged), tuple(sorted(files.items())))
                if key not in seen:
                    seen.add(key)
                    found.append(State(files, acknowledged))
    return found


def _pending(done: list) -> list[int]:
    """Changes of names that no fsync of all their folders has followed."""
    waiting: dict[int, set[int]] = {}
    for i, entry in enumerate(done):
        if isinstance(entry, Change):
            waiting[i] = {folder for folder, _, _ in entry.names}
        elif isinstance(entry, Sync):
            for folders in waiting.values():
                folders.discard(entry.node)
    return [i for i, folders in waiting.items() if folders]


def _choices(pending: list[int], rng: random.Random) -> list[set[int]]:
    """Which of the pending changes reached the disk."""
    if len(pending) <= _MOST_SUBSETS:
        return [set(some) for n in range(len(pending) + 1) for some in itertools.combinations(pending, n)]
    prefixes = [set(pending[:n]) for n in range(len(pending) + 1)]
    alone = [{i} for i in pending] + [set(pending) - {i} for i in pending]
    return prefixes + alone + [{i for i in pending if rng.random() < 0.5} for _ in range(4)]


def _tree(done: list, lost: set[int]) -> dict[int, dict[str, int]]:
    """Folders and the names in them."""
    tree: dict[int, dict[str, int]] = {0: {}}
    for i, entry in enumerate(done):
        if not isinstance(entry, Change) or i in lost:
            continue
        for folder, name, node in entry.names:
            names = tree.setdefault(folder, {})
            if node is None:
                names.pop(name, None)
            else:
                names[name] = node
    return tree


def _contents(done: list, mode: str) -> dict[int, bytes]:
    """Content of every file that was ever written; of what was not synced as much as `mode` says."""
    latest: dict[int, bytes] = {}
    synced: dict[int, bytes] = {}
    for entry in done:
        if isinstance(entry, Write):
            latest[entry.node] = entry.content
        elif isinstance(entry, Sync) and entry.node in latest:
            synced[entry.node] = latest[entry.node]
    return {node: _left(content, synced.get(node, b""), mode) for node, content in latest.items()}


def _left(content: bytes, synced: bytes, mode: str) -> bytes:
    kept = synced if content.startswith(synced) else b""
    rest = content[len(kept) :]
    return {
        "whole": content,
        "synced": synced,
        "half": kept + rest[: len(rest) // 2],
        "zeros": kept + bytes(len(rest)),
    }[mode]


def _files(tree: dict[int, dict[str, int]], contents: dict[int, bytes]) -> dict[Path, bytes | None]:
    """The tree as paths, from its root on."""
    found: dict[Path, bytes | None] = {}
    left = [(Path(), 0)]
    while left:
        folder, node = left.pop()
        for name, child in tree.get(node, {}).items():
            found[folder / name] = contents.get(child)
            if child not in contents:
                left.append((folder / name, child))
    return found
