"""Folders from the open world: links in circles, debris, twins, names of any kind; counted exactly, in one order."""

import os
import random
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import hostile
import pytest
from hostile import picture

from calotype.folder import survey
from calotype.picture_files import inspect

pytestmark = pytest.mark.reliability


def loop(root):
    picture(root / "a/1.png"), picture(root / "b/1.png")
    (root / "a/up").symlink_to(root, target_is_directory=True)
    (root / "b/self").symlink_to(root / "b/self")


def two_loops(root):
    picture(root / "a/1.png"), picture(root / "b/1.png")
    (root / "a/there").symlink_to(root / "b", target_is_directory=True)
    (root / "b/back").symlink_to(root / "a", target_is_directory=True)


def links(root):
    file = picture(root / "a/1.png")
    os.link(file, root / "a/2.png")
    (root / "a/3.png").symlink_to(file)
    picture(root / "b/1.png")


def debris(root):
    picture(root / "a/1.png"), picture(root / "b/1.png")
    for name in (".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/1.png", ".git/1.png", "a/.hidden/1.png", "a/._1.png"):
        picture(root / name)
    (root / "a/Thumbs.db").write_bytes(b"x")


def accents(root):
    for i, form in enumerate(("NFC", "NFD")):
        picture(root / unicodedata.normalize(form, "Käse") / f"{unicodedata.normalize(form, 'é')}.png", (i, 0, 0))


def cases(root):
    picture(root / "Cat/a.png"), picture(root / "cat/a.png"), picture(root / "cat/A.PNG")


def long_names(root):
    picture(root / "a" / ("é" * 125 + "x.png")), picture(root / "a" / ("n" * 251 + ".png"))
    picture(root / "b/two\nlines\t\x7f.png"), picture(root / "b/ .png"), picture(root / "b/-rf *.png")


def bytes_in_names(root):
    picture(os.fsencode(root) + b"/a/\xff\xfe.png"), picture(root / "a/1.png")


def linked_folder(root):
    picture(root.parent / "elsewhere/1.png")
    root.mkdir()
    for name in ("a", "b"):
        (root / name).symlink_to(root.parent / "elsewhere", target_is_directory=True)


def flat(root):
    for i in range(5):
        picture(root / f"{i}.png")


TREES = {  # pictures, classes, links left out
    flat: (5, 0, 0),
    loop: (2, 2, 0),
    two_loops: (2, 1, 0),
    links: (2, 2, 2),
    debris: (2, 2, 0),
    accents: (2, 2, 0),
    cases: (3, 2, 0),
    long_names: (5, 2, 0),
    bytes_in_names: (2, 1, 0),
    linked_folder: (1, 1, 0),
}


@pytest.mark.parametrize("plant", TREES, ids=lambda plant: plant.__name__)
def test_every_tree_is_counted_exactly(plant, tmp_path):
    root = tmp_path / "root"
    plant(root)
    found = survey(root)
    classes = {entry.label for entry in found.entries} - {""}
    assert (len(found.entries), len(classes), len(found.links)) == TREES[plant]
    for entry in found.entries:
        assert inspect(os.path.join(root, entry.file)).format == "PNG"


def test_folders_may_lie_deeper_than_python_recurses():
    root = tempfile.mkdtemp()  # not in pytest's own folder, which it could not clear away
    try:
        there = os.open(root, os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("d", dir_fd=there)
            there, above = os.open("d", os.O_RDONLY, dir_fd=there), there
            os.close(above)
        with os.fdopen(os.open("1.png", os.O_CREAT | os.O_WRONLY, dir_fd=there), "wb") as stream:
            stream.write(hostile.saved("PNG"))
        os.close(there)
        assert [(entry.file.count("/"), entry.label) for entry in survey(Path(root)).entries] == [(1500, "d")]
    finally:
        subprocess.run(["rm", "-rf", root], check=True)


NAMES = ["Z", "a", "É", "E\u0301", "ı", "İ", "i", "I", "10", "9", "ß", "ẞ", "日本", "\U0001f600", "~", "_", " "]
MANIFEST = """
import contextlib, json, os, random, sys
from calotype import cli

def another_disk(path, real=os.scandir):  # which lists its files in an order of its own
    with real(path) as scan:
        found = list(scan)
    random.shuffle(found)
    return contextlib.nullcontext(found)

os.scandir = another_disk
assert cli.main(["data", sys.argv[1], "--image-size", "8", "--fresh", "--out", sys.argv[2]]) == 0
sheet = json.load(open(sys.argv[2] + "/data.json", encoding="utf-8"))
print(sheet["manifest"], sheet["listing"], sheet["fingerprint"], file=sys.stderr)
"""


def test_the_manifest_is_the_same_in_every_locale_and_order(tmp_path, sized):
    """Also where Python takes names for ASCII."""
    environments = [{"LC_ALL": "C"}, {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"}]
    environments += [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}]
    hashes = set()
    for i, environment in enumerate(environments * sized(1, 4)):
        root = tmp_path / f"source{i}" / "pictures"
        names = [f"{folder}/{name}.png" for folder in ("b", "ä") for name in NAMES]
        random.Random(i).shuffle(names)
        for name in names:
            picture(root / name, (len(name), ord(name[0]) % 256, ord(name[2]) % 256))
        words = [sys.executable, "-c", MANIFEST, "pictures", str(tmp_path / f"out{i}")]
        done = subprocess.run(words, cwd=root.parent, env=os.environ | environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        hashes.add(done.stderr.split(b"\n")[-2])
    assert len(hashes) == 1, hashes
