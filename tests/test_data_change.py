"""Pictures that are added, taken away or changed between two calls: no run goes on with others unless it is told to."""

import json
import os

import numpy as np
import pytest
import torch
from hostile import picture

from calotype import cli
from calotype.data import Pictures
from calotype.latents import LatentCache
from calotype.sheet import read_sheet


@pytest.fixture
def root(tmp_path):
    for i in range(12):
        picture(tmp_path / "pictures" / "ab"[i % 2] / f"{i:02d}.png", (i, 0, 99))
    (tmp_path / "pictures/a/00.txt").write_text("the first")
    (tmp_path / "pictures/a/bad.png").write_bytes(b"")
    return tmp_path / "pictures"


def remove(root):
    (root / "b/03.png").unlink()


def add(root):
    picture(root / "a/new\n.png")


def resize(root):
    (root / "a/02.png").write_bytes((root / "a/02.png").read_bytes() + b"\n")


def repaint(root):
    """As many bytes as before, and an old date."""
    file = root / "a/02.png"
    before = file.stat()
    file.write_bytes(file.read_bytes()[:-13] + b"\x01" + file.read_bytes()[-12:])
    os.utime(file, (1, 1))
    assert file.stat().st_size == before.st_size


def relabel(root):
    (root / "a/02.png").rename(root / "b/02.png")


def rewrite(root):
    (root / "a/00.txt").write_text("a caption")


def mend(root):
    picture(root / "a/bad.png")


CHANGES = {
    remove: "1 missing, first b/03.png",
    add: r"1 added, first 'a/new\n.png'",
    resize: "1 changed, first a/02.png",
    repaint: "1 changed, first a/02.png",
    relabel: "1 missing, 1 added, first a/02.png (missing)",
    rewrite: "1 changed, first a/00.png",
    mend: "1 changed, first a/bad.png",
}


def refused(capsys, words, expected):
    capsys.readouterr()
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line and "--allow-data-change" in line, line


def sheet_of(root, out, *more):
    return ["data", str(root), "--image-size", "8", "--allow-bad", "--out", str(out), *more]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_folder_is_refused_by_name_and_read_again_where_allowed(root, tmp_path, capsys, change):
    assert cli.main(sheet_of(root, tmp_path)) == 0
    first = read_sheet(tmp_path / "data.json")
    assert cli.main(sheet_of(root, tmp_path)) == 0
    change(root)
    refused(capsys, sheet_of(root, tmp_path), CHANGES[change])
    assert read_sheet(tmp_path / "data.json").fingerprint == first.fingerprint
    assert cli.main(sheet_of(root, tmp_path, "--allow-data-change")) == 0
    again = read_sheet(tmp_path / "data.json")
    assert again.fingerprint != first.fingerprint
    assert cli.main(sheet_of(root, tmp_path)) == 0
    held_out = {record.file for record in first.records if record.val}
    assert {r.file for r in again.records if r.val} - {"a/new\n.png"} >= held_out - {"b/03.png", "a/02.png"}


def test_touching_or_copying_a_file_is_no_change(root, tmp_path):
    assert cli.main(sheet_of(root, tmp_path)) == 0
    content = (root / "a/02.png").read_bytes()
    (root / "a/02.png").unlink()
    (root / "a/02.png").write_bytes(content)
    os.utime(root / "b/03.png")
    assert cli.main(sheet_of(root, tmp_path)) == 0


TINY = "--width 4 --factor 2 --batch-size 4 --precision fp32 --validations 1 --checkpoint-every 2".split()


def test_a_run_that_goes_on_refuses_other_pictures(root, tmp_path, capsys):
    assert cli.main(sheet_of(root, tmp_path)) == 0
    words = ["train-vae", str(tmp_path / "data.json"), *TINY, "--out", str(tmp_path / "vae"), "--steps"]
    assert cli.main([*words, "4"]) == 0
    remove(root)
    refused(capsys, [*words, "8"], CHANGES[remove])
    assert cli.main([*words, "6", "--allow-data-change"]) == 0  # by the old sheet, with another in its place
    assert "1 missing, first b/03.png" in capsys.readouterr().out
    assert cli.main(sheet_of(root, tmp_path, "--allow-data-change")) == 0
    refused(capsys, [*words, "8"], "the data changed since this run began")
    assert cli.main([*words, "8", "--allow-data-change"]) == 0  # by the new one
    assert cli.main([*words, "10"]) == 0
    assert json.loads((tmp_path / "vae/finished.json").read_text())["steps"] == 10
    assert "allow_data_change" not in (tmp_path / "vae/config.json").read_text()


def encode(tmp_path, *more):
    words = ["encode", str(tmp_path / "data.json"), "--vae", str(tmp_path / "vae/vae"), "--precision", "fp32"]
    return [*words, "--out", str(tmp_path / "latents"), *more]


def test_latents_are_not_made_of_other_pictures(root, tmp_path, capsys):
    assert cli.main(sheet_of(root, tmp_path)) == 0
    words = ["train-vae", str(tmp_path / "data.json"), *TINY, "--steps", "2", "--out", str(tmp_path / "vae")]
    assert cli.main(words) == 0
    repaint(root)
    refused(capsys, encode(tmp_path), CHANGES[repaint])
    assert not (tmp_path / "latents").exists()
    assert cli.main(encode(tmp_path, "--allow-data-change")) == 0


def test_a_neighbour_stands_in_with_its_own_label_and_caption(root, tmp_path):
    (root / "b/01.txt").write_text("the neighbour")
    assert cli.main(sheet_of(root, tmp_path)) == 0
    words = ["train-vae", str(tmp_path / "data.json"), *TINY, "--steps", "2", "--out", str(tmp_path / "vae")]
    assert cli.main(words) == 0
    records = Pictures(read_sheet(tmp_path / "data.json"), "train").records
    last = max(i for i, record in enumerate(records) if record.label == 0)
    (root / records[last].file).unlink()
    assert cli.main(encode(tmp_path, "--allow-data-change")) == 0
    cache = LatentCache(tmp_path / "latents", "train")
    assert cache.gather(np.array([last, last + 1]), "label").tolist() == [1, 1]
    assert cache.caption(last) == cache.caption(last + 1) == records[last + 1].text == "the neighbour"
    first, second = cache.gather(np.array([last, last + 1]), "mean")
    assert torch.equal(first, second)
