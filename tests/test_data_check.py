"""`calotype data check`: what it prints, what it returns, and that it only looks."""

import os
import re
import subprocess
import sys

import pytest
from hostile import good, picture, saved

from calotype import cli
from calotype.sheet import read_sheet


@pytest.fixture
def root(tmp_path):
    for i in range(100):
        picture(tmp_path / "pictures" / "ab"[i % 2] / f"{i:02d}.png")
    return tmp_path / "pictures"


def check(capsys, root, *more, code=0):
    capsys.readouterr()
    assert cli.main(["data", "check", str(root), *more]) == code
    return capsys.readouterr()


def test_good_files_are_summed_up(root, tmp_path, capsys):
    (root / "a/photo.JPG").write_bytes(saved("JPEG"))
    (root / "b/moving.gif").write_bytes(good()["moving.gif"].data)
    (root / "b/deep.png").write_bytes(good()["deep.png"].data)
    (root / "b/00.txt").write_text("not a picture's")
    (root / "b/01.txt").write_text("a picture's")
    os.link(root / "a/00.png", root / "b/again.png")
    (root / "c").mkdir()
    (root / "a/raw.heic").write_bytes(b"x")
    before = sorted(root.rglob("*"))
    said = check(capsys, root).out
    for line in (
        "Good 103: PNG 101, JPEG 1, GIF 1; 12x8 100, 40x24 2, 256x256 1",
        "Classes 2: b 52, a 51",
        "Captions 1",
        "Unreadable 0",
        "  b/again.png is a/00.png",
        "Note: 1 file of other kinds, passed over (.heic 1).",
        "Note: 1 caption without a picture (first b/00.txt).",
        "Note: 1 folder without a picture, no class (first c).",
        "Note: 1 file of more than one frame or page: the first is taken.",
        "Note: 1 file of more than 8 bits a sample: scaled to 8, nothing is clipped.",
    ):
        assert line in said.splitlines(), said
    assert sorted(root.rglob("*")) == before


def test_bad_files_are_listed_and_more_than_one_in_a_hundred_fail(root, capsys):
    (root / "a/bad.jpg").write_text("<html>")
    said = check(capsys, root).out
    assert "Unreadable 1, 0.99 % and not more than the 1 % allowed:" in said
    assert f"  {root}/a/bad.jpg: HTML or XML text, not a picture; fetch the picture again" in said
    (root / "b/cut.jpg").write_bytes(saved("JPEG")[:-40])
    said = check(capsys, root, code=2)
    assert "Unreadable 2, 2 % and more than" in said.out and f"{root}/b/cut.jpg: damaged" in said.out
    assert "2 of 102 files cannot be read" in said.err and said.err.count("\n") == 1


def test_damage_in_the_middle_is_found_by_decoding(root, capsys):
    file = root / "a/00.png"
    content = bytearray(file.read_bytes())
    content[45:50] = bytes(5)
    file.write_bytes(content)
    assert "Unreadable 0" in check(capsys, root).out
    assert "Unreadable 1" in check(capsys, root, "--decode").out


def test_the_fingerprint_is_that_of_the_data_sheet(root, tmp_path, capsys):
    def fingerprint():
        return re.search(r"Fingerprint (\w{64}) ", check(capsys, root).out)[1]

    assert cli.main(["data", str(root), "--image-size", "8", "--out", str(tmp_path / "out")]) == 0
    first = fingerprint()
    assert first == read_sheet(tmp_path / "out/data.json").listing
    (root / "a/00.png").rename(root / "b/00.png")
    assert fingerprint() != first
    (root / "b/00.png").rename(root / "a/00.png")
    assert fingerprint() == first


def test_what_looks_like_a_slip_is_noted(root, capsys):
    (root / "a").rename(root / "train")
    (root / "b").rename(root / "Val")
    assert "Note: The classes are called Val and train; if they are splits" in check(capsys, root).out
    (root / "Val").rename(root / "TRAIN")
    assert "Note: Classes 'TRAIN' and 'train' differ in case" in check(capsys, root).out
    (root / "metadata.csv").write_text("file_name\ntrain/00.png\ntrain/02.png")
    assert "Note: 98 pictures not named in the metadata file, left out" in check(capsys, root).out


def test_refusals(tmp_path, capsys):
    assert "is not a folder" in check(capsys, tmp_path / "none", code=2).err
    assert "holds no pictures" in check(capsys, tmp_path, code=2).err
    assert "SOURCE shapes is drawn" in check(capsys, "shapes", code=2).err


def test_a_folder_called_check_can_still_be_given(root, tmp_path, monkeypatch, capsys):
    root.rename(tmp_path / "check")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "./check", "--image-size", "8", "--out", "out"]) == 0
    assert read_sheet(tmp_path / "out/data.json").classes == {"a": 50, "b": 50}
    assert check(capsys, "check").out.lstrip().startswith("check: 100 files")


def test_it_starts_without_torch(root):
    code = f"import sys; from calotype import cli; cli.main(['data', 'check', {str(root)!r}]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Unreadable 0" in done.stdout and "torch" not in done.stdout.split()


def test_help_lists_it(capsys):
    assert cli.main(["--help"]) == 0
    assert "  data check  " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["data", "check", "--help"])
    assert "usage: calotype data check" in capsys.readouterr().out
