"""How pictures may lie in a folder, and what each layout means or why it is refused."""

import json

import pytest
from hostile import picture

from calotype import cli
from calotype.sheet import read_sheet


def lay(root, *names):
    for i, name in enumerate(names):
        picture(root / name, (i * 20 % 256, 40, 90))


def table(root, name, rows):
    root.mkdir(exist_ok=True)
    if name.endswith("csv"):
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    else:
        lines = map(json.dumps, rows)
    (root / name).write_text("\n".join(lines))


def flat(root):
    lay(root, "1.png", "2.png", "3.png")


def one_class(root):
    lay(root, "a/1.png", "a/2.png")


def two_classes(root):
    lay(root, "a/1.png", "a/2.png", "b/1.png")


def nested(root):
    lay(root, "a/x/1.png", "a/y/z/2.png", "b/1.png")


def empty_class(root):
    two_classes(root)
    (root / "c").mkdir()


def class_of_bad_files(root):
    lay(root, "a/1.png", "a/2.png", "b/1.png")
    for i in range(200):
        picture(root / f"b/more{i}.png", (i, 0, 0))
    (root / "c").mkdir()
    (root / "c/1.png").write_bytes(b"")


def labels_in_a_table(root):
    lay(root, "1.png", "2.png", "deep/3.png")
    table(root, "metadata.csv", [{"file_name": n, "label": i} for i, n in enumerate(["1.png", "2.png", "deep/3.png"])])


def captions_in_lines(root):
    lay(root, "1.png", "2.png")
    table(root, "metadata.jsonl", [{"file_name": f"{i}.png", "text": f"number {i}"} for i in (1, 2)])


def captions_beside(root):
    flat(root)
    (root / "1.txt").write_text("the first")


def not_all_in_the_table(root):
    flat(root)
    table(root, "metadata.csv", [{"file_name": f"{i}.png", "label": "x"} for i in (1, 2)])


@pytest.mark.parametrize(
    ("plant", "classes", "pictures", "captions"),
    [
        (flat, {}, 3, 0),
        (one_class, {"a": 2}, 2, 0),
        (two_classes, {"a": 2, "b": 1}, 3, 0),
        (nested, {"a": 2, "b": 1}, 3, 0),
        (empty_class, {"a": 2, "b": 1}, 3, 0),
        (class_of_bad_files, {"a": 2, "b": 201}, 203, 0),
        (labels_in_a_table, {"0": 1, "1": 1, "2": 1}, 3, 0),
        (captions_in_lines, {}, 2, 2),
        (captions_beside, {}, 3, 1),
        (not_all_in_the_table, {"x": 2}, 2, 0),
    ],
)
def test_layouts_that_mean_something(tmp_path, plant, classes, pictures, captions):
    plant(tmp_path / "root")
    assert cli.main(["data", str(tmp_path / "root"), "--image-size", "8", "--out", str(tmp_path / "out")]) == 0
    sheet = read_sheet(tmp_path / "out/data.json")
    assert (sheet.classes, len(sheet.records)) == (classes, pictures)
    assert sum(bool(record.text) for record in sheet.records) == captions


def missing(root):
    pass


def a_file(root):
    root.write_bytes(b"PK\x03\x04")


def empty(root):
    root.mkdir()


def hidden_alone(root):
    lay(root, ".cache/1.png", "__MACOSX/1.png")


def archive_alone(root):
    root.mkdir()
    (root / "pictures.zip").write_bytes(b"PK\x03\x04")


def mixed(root):
    two_classes(root)
    lay(root, "loose\n.png")


def named_but_absent(root):
    flat(root)
    table(root, "metadata.csv", [{"file_name": f"{i}.png"} for i in range(1, 9)])


def named_twice(root):
    flat(root)
    table(root, "metadata.jsonl", [{"file_name": "1.png", "label": "ab"[i]} for i in range(2)])


def half_labelled(root):
    flat(root)
    table(root, "metadata.jsonl", [{"file_name": "1.png", "label": "a"}, {"file_name": "2.png"}])


def outside(root):
    flat(root)
    table(root, "metadata.jsonl", [{"file_name": "../secret.png"}])


def nothing_named(root):
    flat(root)
    table(root, "metadata.jsonl", [{"file": "1.png"}])


def a_zero(root):
    flat(root)
    table(root, "metadata.jsonl", [{"file_name": "1\0.png"}])


def a_list_as_label(root):
    flat(root)
    table(root, "metadata.jsonl", [{"file_name": "1.png", "label": ["a", "b"]}])


def brackets(root):
    root.mkdir()
    (root / "metadata.jsonl").write_text("[" * 100_000)


def no_text(root):
    picture(bytes(root) + b"/\xff/1.png")


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (missing, "is not a folder; give a folder"),
        (a_file, "is a file, not a folder; unpack it"),
        (empty, "holds no pictures"),
        (hidden_alone, "holds no pictures"),
        (archive_alone, "holds no pictures"),
        (mixed, r"1 pictures such as 'loose\n.png' lie beside the class folders; move them"),
        (named_but_absent, "5 of 8 files cannot be read, first"),
        (named_twice, "line 2: 1.png is named twice; keep one"),
        (half_labelled, "2.png has no label but others have; label all or none"),
        (outside, "line 1: ../secret.png lies outside"),
        (nothing_named, "line 1: no file_name; every line needs one"),
        (a_zero, "line 1: no file_name"),
        (a_list_as_label, "is neither a text nor a number"),
        (brackets, "line 1 is not JSON"),
        (no_text, r"the name of folder '\udcff' is not UTF-8; rename it"),
    ],
)
def test_layouts_that_are_refused_in_one_line(tmp_path, capsys, plant, words):
    plant(tmp_path / "root")
    assert cli.main(["data", str(tmp_path / "root"), "--image-size", "8", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and str(tmp_path) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9])
def test_fewer_pictures_than_a_batch_are_enough(tmp_path, count):
    lay(tmp_path / "root", *(f"{i}.png" for i in range(count)))
    words = "--image-size 8 --width 4 --factor 2 --batch-size 8 --steps 3 --precision fp32 --validations 1".split()
    assert cli.main(["train-vae", str(tmp_path / "root"), *words, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/finished.json").read_text())["steps"] == 3
