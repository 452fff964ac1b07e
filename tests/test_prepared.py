"""Pictures that were decoded while their folder was read are those that are read again."""

import numpy as np
import pytest
import torch
from PIL import Image

from calotype import prepared
from calotype.data import Pictures
from calotype.settings import SheetSettings
from calotype.sheet import make_sheet


def photograph(size, grey, seed):
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 256, (8, 8, 1 if grey else 3), dtype=np.uint8).repeat(3 if grey else 1, axis=2)
    return Image.fromarray(x).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(params=[False, True], ids=["colour", "grey"])
def folder(request, tmp_path):
    root = tmp_path / "pictures"
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for i, size in enumerate([(700, 500), (260, 300), (24, 40), (16, 24)]):
            photograph(size, request.param, i).save(root / label / f"{i}.jpg", quality=95)
        photograph((50, 60), request.param, 9).convert("LA" if request.param else "RGBA").save(root / label / "z.png")
    return root


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("channels", [None, 1])
def test_they_are_the_same(folder, tmp_path, fit, channels, monkeypatch):
    settings = SheetSettings(source=str(folder), out=tmp_path, fit=fit, channels=channels, val="0.3")
    again, kept = (make_sheet(str(folder), settings, 0, "24x16", keep) for keep in (False, True))
    assert again == kept and again.prepared is None
    grey = again.channels == 1 and "grey" in str(tmp_path)
    assert (kept.prepared is not None) == (channels is None or grey)
    for split in ("train", "val"):
        wanted = [Pictures(again, split)[i] for i in range(again.counts[split])]
        with monkeypatch.context() as patch:
            if kept.prepared is not None:
                patch.setattr("calotype.data.load_image", lambda *_, **__: pytest.fail("decoded twice"))
            pictures = Pictures(kept, split)
            found = [pictures[i] for i in range(kept.counts[split])]
        assert all(torch.equal(*pair) for pair in zip(wanted, found, strict=True))
    kept.write(tmp_path)


def test_what_finds_no_room_is_read_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_MEMORY", 3 * 3 * 16 * 24)
    settings = SheetSettings(source=str(folder), out=tmp_path)
    sheet = make_sheet(str(folder), settings, 0, "16x24", keep=True)
    assert sum(sheet.prepared.take(file, 3) is not None for file in folder.resolve().rglob("*.*")) == 3
    assert Pictures(sheet, "train")[0].shape[1:] == (16, 24)
