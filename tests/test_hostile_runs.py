"""Runs on hostile pictures, and on pictures that go bad while a run goes on."""

import json
import math
import random

import hostile
import pytest
from hostile import picture

from calotype import cli, data
from calotype.latents import LatentCache
from calotype.randomness import KeyedOrder
from calotype.sheet import read_sheet
from calotype.stage1_vae.train import VaeStage

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
]


def folder_of(root, count):
    colours = random.Random(0)
    for i in range(count):
        picture(root / "ab"[i % 2] / f"{i:03d}.png", tuple(colours.randrange(256) for _ in range(3)))
    return root


TINY = "--width 8 --factor 2 --batch-size 8 --precision fp32 --validations 2 --image-size 8".split()


def train(source, out, *more):
    return cli.main(["train-vae", str(source), *TINY, "--out", str(out), *map(str, more)])


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def all_finite(out):
    losses = [line["loss[train]"] for line in lines(out) if "loss[train]" in line]
    return bool(losses) and all(map(math.isfinite, losses))


def test_a_folder_full_of_hostile_files_trains(tmp_path, capsys):
    corpus, root = hostile.corpus(), folder_of(tmp_path / "pictures", 60)
    for name, case in corpus.items():
        (root / "a" / name).write_bytes(case.data)
    special = hostile.special_files(root / "b")
    bad = sum(case.fault is not None for case in corpus.values()) + len(special)
    assert train(root, tmp_path / "run", "--steps", 12) == 2
    assert f"{bad} of {60 + len(corpus) + len(special)} files cannot be read" in capsys.readouterr().err
    assert train(root, tmp_path / "run", "--steps", 12, "--allow-bad") == 0
    sheet = read_sheet(tmp_path / "run/data.json")
    assert sheet.bad_count == bad and len(sheet.records) == 60 + len(corpus) - (bad - len(special))
    assert all_finite(tmp_path / "run")


def test_one_bad_file_in_a_hundred_is_no_matter(tmp_path):
    root = folder_of(tmp_path / "pictures", 100)
    (root / "a/bad.jpg").write_bytes(b"")
    assert train(root, tmp_path / "run", "--steps", 4) == 0
    assert read_sheet(tmp_path / "run/data.json").bad_count == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resumed", [False, True])
def test_files_that_go_in_mid_run_are_replaced_and_counted(tmp_path, monkeypatch, capsys, workers, resumed):
    """One in twenty is deleted at step 3: the run ends, its losses are finite, and just these are counted."""
    root = folder_of(tmp_path / "pictures", 120)
    assert cli.main(["data", str(root), "--image-size", "8", "--out", str(tmp_path)]) == 0
    sheet = read_sheet(tmp_path / "data.json")
    chosen = [record.file for record in sheet.records if not record.val][::20]
    monkeypatch.setattr(data, "_MEMORY", 0)  # as where there are too many pictures to keep
    at_step(monkeypatch, 3, lambda: [(root / name).unlink() for name in chosen])
    source, out = tmp_path / "data.json", tmp_path / "run"
    more = ["--workers", workers, "--log-every", 5, "--checkpoint-every", 5]
    if resumed:
        assert train(source, out, "--steps", 14, *more) == 0
        assert train(source, out, "--steps", 45, *more) == 2
        assert f"{len(chosen)} missing, first {min(chosen)}" in capsys.readouterr().err
        more.append("--allow-data-change")
    assert train(source, out, "--steps", 45, *more) == 0
    assert all_finite(out) and len(chosen) >= 5
    assert json.loads((out / "finished.json").read_text())["data_errors[train]"] == len(chosen)
    printed = capsys.readouterr().out
    assert printed.count("stands in for it") == (0 if resumed else 1)
    assert "could not be read, first" in (out / "metrics.jsonl").read_text()


def at_step(monkeypatch, number, act):
    """Do something once, while a run takes that step."""
    step, todo = VaeStage.step, [act]

    def acting(stage, batch, here):
        if here == number and todo:
            todo.pop()()
        return step(stage, batch, here)

    monkeypatch.setattr(VaeStage, "step", acting)


def test_a_whole_run_outlives_a_picture_and_then_asks_about_others(tmp_path, monkeypatch, capsys):
    root, out = folder_of(tmp_path / "pictures", 130), tmp_path / "out"
    words = ["run", str(root), "--out", str(out), *"--image-size 8 --steps 6 --batch-size 8 --precision fp32".split()]
    words += ["--factor", "2"]
    monkeypatch.setattr(data, "_MEMORY", 0)
    at_step(monkeypatch, 2, lambda: (root / "a/002.png").unlink())
    assert cli.main(words) == 0
    first = LatentCache(out / "latents", "train")
    picture(root / "b/new.png", (9, 99, 200))
    capsys.readouterr()
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 missing, 1 added, first a/002.png (missing)" in line and "--allow-data-change" in line
    assert cli.main([*words, "--allow-data-change"]) == 0
    assert "train-diffusion is finished and stays" in capsys.readouterr().out
    again = LatentCache(out / "latents", "train")
    assert again.index.fingerprint == read_sheet(out / "data.json").fingerprint != first.index.fingerprint
    assert cli.main(words) == 0


def test_another_picture_stands_in_by_position_alone(tmp_path):
    """Whoever reads a position, in whatever order and process, sees the same."""
    root = folder_of(tmp_path / "pictures", 40)
    assert cli.main(["data", str(root), "--image-size", "8", "--out", str(tmp_path)]) == 0
    sheet = read_sheet(tmp_path / "data.json")
    whole = data.PictureBatches(data.Pictures(sheet, "train"), seed=3, flip=False)
    expected = {p: (whole[p][0], whole[p][1]) for p in range(300)}
    gone = {i for i in range(len(whole.pictures)) if i % 6 == 0}
    for i in gone:
        whole.pictures.path(i).write_bytes(b"")
    order = KeyedOrder(len(whole.pictures), 3)
    for start in (0, 57, 199):
        batches = data.PictureBatches(data.Pictures(sheet, "train"), seed=3, flip=False)
        for position in range(start, start + 60):
            near = next(p for p in range(position, position + 80) if order.index(p) not in gone)
            x, label, _, unread = batches[position]
            assert (x == expected[near][0]).all() and label == expected[near][1]
            assert list(unread) == [order.index(p) for p in range(position, near)]


def test_where_all_is_gone_the_run_ends_in_one_line(tmp_path, monkeypatch, capsys):
    root = folder_of(tmp_path / "pictures", 40)
    monkeypatch.setattr(data, "_MEMORY", 0)
    at_step(monkeypatch, 1, lambda: root.rename(tmp_path / "elsewhere"))
    assert train(root, tmp_path / "run", "--steps", 30, "--workers", 1) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "can be read any more; was the folder moved?" in line
