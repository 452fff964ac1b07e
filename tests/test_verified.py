"""A cache is read through once, and again where a file may be another; whatever is changed is found."""

import os
import time

import numpy as np
import pytest
import torch

from calotype import verified
from calotype.errors import UserError
from calotype.latents import VERSION, Index, LatentCache, Shards


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of two shards, the moment of whose writing is long past."""
    monkeypatch.setattr(verified, "_FRESH", 0.05)
    written, names = Shards(tmp_path), [f"train-{i:05d}.safetensors" for i in range(2)]
    for number, name in enumerate(names):
        moments = {"mean": torch.full((6, 2, 4, 4), float(number)), "std": torch.ones(6, 2, 4, 4)}
        written.write(name, moments, torch.arange(6), [""] * 6)
    known = ("data", "vae", [2, 4, 4], False, ["a"], [8, 8], {"train": 12}, {"train": names}, written.sha256)
    Index(VERSION, *known).write(tmp_path)
    time.sleep(0.1)
    return tmp_path


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read through."""
    names, read = [], verified.sha256
    monkeypatch.setattr(verified, "sha256", lambda file: names.append(file.name) or read(file))
    return names


def test_what_was_found_whole_is_not_read_again(folder, read):
    LatentCache(folder, "train")
    assert sorted(read) == ["train-00000.safetensors", "train-00001.safetensors"]
    cache = LatentCache(folder, "train")
    assert len(read) == 2
    assert cache.gather(np.array([0, 11]), "mean")[:, 0, 0, 0].tolist() == [0, 1]


def in_place(file):
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))


def with_its_old_time(file):
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    in_place(file)
    os.utime(file, ns=times)


def replaced(file):
    times, content = (file.stat().st_atime_ns, file.stat().st_mtime_ns), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.with_name("other").write_bytes(content)
    os.utime(file.with_name("other"), ns=times)
    file.with_name("other").replace(file)


@pytest.mark.parametrize("change", [in_place, with_its_old_time, replaced])
def test_a_bit_that_changes_later_is_found(folder, change):
    LatentCache(folder, "train")
    change(folder / "train-00001.safetensors")
    with pytest.raises(UserError, match="train-00001.safetensors is damaged"):
        LatentCache(folder, "train")


def test_a_file_that_goes_is_missed(folder):
    LatentCache(folder, "train")
    (folder / "train-00000.safetensors").unlink()
    with pytest.raises(UserError, match="train-00000.safetensors is missing"):
        LatentCache(folder, "train")


def test_a_copy_is_read_through_on_its_own(folder, read, tmp_path):
    import shutil

    LatentCache(folder, "train")
    LatentCache(shutil.copytree(folder, tmp_path / "copy"), "train")
    assert len(read) == 4


def test_a_week_later_all_is_read_again(folder, read, monkeypatch):
    LatentCache(folder, "train")
    now = time.time()
    monkeypatch.setattr(verified.time, "time", lambda: now + 8 * 24 * 3600)
    LatentCache(folder, "train")
    assert len(read) == 4


def test_what_was_written_just_now_is_not_taken_for_settled(folder, read, monkeypatch):
    monkeypatch.setattr(verified, "_FRESH", 3600.0)
    for _ in range(2):
        LatentCache(folder, "train")
    assert len(read) == 4 and not (folder / "verified.json").exists()


@pytest.mark.parametrize("text", ["", "[1]", "7", '{"train-00000.safetensors": 1}', '{"train-00000.safetensors": {}}'])
def test_a_damaged_note_costs_a_reading_and_nothing_else(folder, read, text):
    (folder / "verified.json").write_text(text)
    LatentCache(folder, "train")
    assert len(read) == 2


def test_a_folder_that_takes_no_note_is_read_each_time(folder, read, monkeypatch):
    def refuse(file, text):
        raise PermissionError(file)

    monkeypatch.setattr(verified, "write_text", refuse)
    for _ in range(2):
        LatentCache(folder, "train")
    assert len(read) == 4
