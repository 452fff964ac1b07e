import csv
import json
import os

import pytest
from PIL import Image

from calotype import cli
from calotype.data import Pictures
from calotype.sheet import read_sheet


def picture(file, colour=(200, 30, 30), size=(12, 8)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    return file


def sheet(tmp_path, root, *flags, code=0):
    out = tmp_path / "out"
    assert cli.main(["data", str(root), "--image-size", "8", "--fresh", "--out", str(out), *map(str, flags)]) == code
    return read_sheet(out / "data.json") if code == 0 else None


def labels(sheet):
    return {record.file: (sheet.class_names[record.label] if record.label >= 0 else None) for record in sheet.records}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "pictures"


def test_flat_folder_is_unconditional(tmp_path, root):
    for i in range(6):
        picture(root / f"{i}.png")
    found = sheet(tmp_path, root)
    assert found.class_names == [] and len(found.records) == 6 and set(labels(found).values()) == {None}


def test_one_folder_a_class_with_nested_ones(tmp_path, root):
    picture(root / "b/1.png"), picture(root / "a/2.jpg"), picture(root / "a/deep/3.webp")
    found = sheet(tmp_path, root)
    assert labels(found) == {"a/2.jpg": "a", "a/deep/3.webp": "a", "b/1.png": "b"}
    assert found.classes == {"a": 2, "b": 1}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_files(tmp_path, root, name):
    rows = [{"file_name": f"x/{i}.png", "label": "ab"[i % 2], "text": f"text, {i}"} for i in range(4)]
    for row in rows:
        picture(root / row["file_name"])
    if name.endswith("jsonl"):
        (root / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        with (root / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    found = sheet(tmp_path, root)
    assert labels(found) == {row["file_name"]: row["label"] for row in rows}
    assert [record.text for record in found.records] == [row["text"] for row in rows] and found.captions


def test_captions_beside_the_pictures(tmp_path, root):
    picture(root / "1.png").with_suffix(".txt").write_text(" a red thing\n")
    picture(root / "2.png")
    assert [record.text for record in sheet(tmp_path, root).records] == ["a red thing", ""]


def test_debris_is_no_class_and_links_count_once(tmp_path, root):
    file = picture(root / "a/1.png")
    picture(root / ".ipynb_checkpoints/1.png"), picture(root / "__MACOSX/1.png"), picture(root / "a/._1.png")
    os.link(file, root / "a/same.png")
    (root / "a/loop").symlink_to(root, target_is_directory=True)
    (root / "a/notes.txt").write_text("no picture")
    picture(root / "a/2.png", (9, 9, 9))
    assert labels(sheet(tmp_path, root)) == {"a/1.png": "a", "a/2.png": "a"}


def test_order_follows_the_names_alone(tmp_path, root):
    names = ["Z.png", "a.png", "É.png", "ı.png", "10.png", "9.png"]
    for name in names:
        picture(root / name)
    first = sheet(tmp_path, root)
    for name in names:
        (root / name).unlink()
    for name in reversed(names):
        picture(root / name)
    again = sheet(tmp_path, root)
    assert [record.file for record in again.records] == sorted(names) and again.fingerprint == first.fingerprint


def test_bad_files_are_counted_named_and_limited(tmp_path, root, capsys):
    for i in range(99):
        picture(root / f"{i}.png")
    (root / "bad.png").write_bytes(b"")
    found = sheet(tmp_path, root)
    assert found.bad_count == 1 and found.bad[0]["file"] == "bad.png" and "empty" in found.bad[0]["reason"]
    assert found.counts["train"] + found.counts["val"] == 99
    (root / "worse.jpg").write_text("<html>")
    before = (tmp_path / "out/data.json").read_bytes()
    capsys.readouterr()
    sheet(tmp_path, root, code=2)
    message = capsys.readouterr().err
    assert "2 of 101" in message and "--allow-bad" in message and message.count("\n") == 1
    assert (tmp_path / "out/data.json").read_bytes() == before
    assert sheet(tmp_path, root, "--allow-bad").bad_count == 2


@pytest.mark.parametrize("content", [{}, {"x.png": b"", "y.jpg": b"<html>"}, {"notes.txt": b"hello"}])
def test_folders_without_a_readable_picture(tmp_path, root, capsys, content):
    root.mkdir()
    for name, data in content.items():
        (root / name).write_bytes(data)
    sheet(tmp_path, root, code=2)
    assert str(root) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_sources(tmp_path, capsys):
    for source in ("nowhere", "shape", "ftp:x"):
        sheet(tmp_path, source, code=2)
        assert f"SOURCE {source}" in capsys.readouterr().err


def test_held_out_by_hash_never_moves(tmp_path, root):
    for i in range(200):
        picture(root / f"{i}.png")
    first = {record.file for record in sheet(tmp_path, root, "--val", "0.2").records if record.val}
    assert 20 < len(first) < 60
    for i in range(200, 260):
        picture(root / f"{i}.png")
    again = {record.file for record in sheet(tmp_path, root, "--val", "0.2").records if record.val}
    assert {file for file in again if int(file[:-4]) < 200} == first


def test_one_picture_is_held_out_at_least(tmp_path, root):
    picture(root / "1.png"), picture(root / "2.png")
    assert sheet(tmp_path, root).counts == {"train": 1, "val": 1}


def test_a_folder_to_validate_on(tmp_path, root, capsys):
    picture(root / "a/1.png"), picture(root / "b/1.png")
    picture(tmp_path / "val/b/1.png", (9, 9, 9))
    found = sheet(tmp_path, root, "--val", tmp_path / "val")
    assert found.counts == {"train": 2, "val": 1}
    held_out = Pictures(found, "val")
    assert held_out.labels.tolist() == [1] and held_out[0].max() == 9
    picture(tmp_path / "val/c/1.png")
    capsys.readouterr()
    sheet(tmp_path, root, "--val", tmp_path / "val", code=2)
    assert "'c'" in capsys.readouterr().err


def test_grey_pictures_have_one_channel_unless_asked(tmp_path, root):
    picture(root / "1.png", (7, 7, 7)), picture(root / "2.png", (90, 90, 90))
    assert sheet(tmp_path, root).channels == 1
    assert Pictures(sheet(tmp_path, root, "--channels", "3"), "train")[0].shape == (3, 8, 8)
    picture(root / "3.png", (90, 90, 91))
    assert sheet(tmp_path, root).channels == 3


def test_fingerprint_follows_content_labels_and_preparation(tmp_path, root):
    picture(root / "a/1.png"), picture(root / "b/2.png")
    first = sheet(tmp_path, root).fingerprint
    assert sheet(tmp_path, root, "--fit", "pad").fingerprint != first
    size = (root / "a/1.bmp", (1, 2, 3))
    picture(*size)
    with_bmp = sheet(tmp_path, root).fingerprint
    picture(root / "a/1.bmp", (3, 2, 1))  # as many bytes, other pixels
    assert len({first, with_bmp, sheet(tmp_path, root).fingerprint}) == 3


def test_a_changed_manifest_is_noticed(tmp_path, root, capsys):
    picture(root / "1.png"), picture(root / "2.png")
    sheet(tmp_path, root)
    manifest = tmp_path / "out/manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("1.png", "3.png"))
    flags = ["--image-size", "8", "--out", str(tmp_path / "vae"), "--steps", "1"]
    assert cli.main(["train-vae", str(tmp_path / "out/data.json"), *flags]) == 2
    assert "manifest.jsonl was changed" in capsys.readouterr().err


def test_contradicting_the_sheet_is_refused(tmp_path, root, capsys):
    picture(root / "1.png"), picture(root / "2.png")
    sheet(tmp_path, root)
    flags = ["--image-size", "16", "--out", str(tmp_path / "vae"), "--steps", "1"]
    assert cli.main(["train-vae", str(tmp_path / "out/data.json"), *flags]) == 2
    message = capsys.readouterr().err
    assert "--image-size 16x16" in message and "8x8" in message


def test_a_file_that_goes_bad_is_replaced_and_named_once(tmp_path, root, capsys):
    for i in range(3):
        picture(root / f"{i}.png", (i, i, i))
    pictures = Pictures(sheet(tmp_path, root), "train")
    (root / pictures.records[0].file).write_bytes(b"")
    capsys.readouterr()
    assert int(pictures[0].max()) == int(pictures[1].max())
    assert capsys.readouterr().out.count("Replaced") == 1
    pictures._kept.clear()
    pictures[0]
    assert "Replaced" not in capsys.readouterr().out


def test_shapes_are_balanced_and_split(tmp_path):
    found = sheet(tmp_path, "shapes")
    assert len(found.classes) == 48 and set(found.classes.values()) == {250}
    assert 450 < found.counts["val"] < 750 and found.channels == 3
    assert found.records[0].text.startswith("a ")


def test_numbers_are_labels_too(tmp_path, root):
    for i in range(4):
        picture(root / f"{i}.png")
    (root / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{i}.png", "label": i % 2}) + "\n" for i in range(4))
    )
    assert sheet(tmp_path, root).classes == {"0": 2, "1": 2}


def test_a_table_that_is_not_utf8_is_named(tmp_path, root, capsys):
    picture(root / "1.png")
    (root / "metadata.csv").write_bytes("file_name,label\n1.png,Käse\n".encode("latin-1"))
    sheet(tmp_path, root, code=2)
    assert "metadata.csv" in (message := capsys.readouterr().err) and "UTF-8" in message


def test_nothing_left_to_train_on_or_to_hold_out(tmp_path, root, capsys):
    picture(root / "1.png")
    sheet(tmp_path, root, code=2)
    assert "no picture is left to hold out" in capsys.readouterr().err
    picture(root / "2.png"), picture(root / "val/1.png")
    sheet(tmp_path, root, "--val", root / "val", code=2)
    assert "lies inside SOURCE" in capsys.readouterr().err
    sheet(tmp_path, "shapes", "--val", root, code=2)
    assert "shapes has no folders" in capsys.readouterr().err


def test_sizes_are_those_of_the_files(tmp_path, root):
    picture(root / "1.jpg", size=(2000, 1500)), picture(root / "2.png")
    assert sheet(tmp_path, root).sizes == {"1500x2000": 1, "8x12": 1}


def test_another_seed_is_not_passed_over(tmp_path, capsys):
    words = ["data", "shapes", "--image-size", "16", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert cli.main([*words, "--seed", "5"]) == 2
    assert "--seed 0" in capsys.readouterr().err
