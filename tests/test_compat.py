"""Model folders and pictures of every version so far: they load, and draw what they drew."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calotype import cli
from calotype.pipeline.png import read_facts

ROOT = Path(__file__).parent / "compat"
VERSIONS = sorted(folder for folder in ROOT.iterdir() if folder.is_dir())


@pytest.mark.parametrize("version", VERSIONS, ids=lambda folder: folder.name)
def test_an_older_model_draws_its_pictures_again(version, tmp_path, capsys):
    files = sorted(version.glob("*.png"))
    assert len(files) >= 2 and sum(f.stat().st_size for f in version.rglob("*") if f.is_file()) <= 200_000
    for file in files:
        assert read_facts(file)["software"] == f"calotype {version.name}"
        out = tmp_path / file.name
        assert cli.main(["regenerate", str(file), "--model", str(version / "model"), "--out", str(out)]) == 0
        before, after = (np.asarray(Image.open(picture), dtype=int) for picture in (file, out))
        assert before.std() > 5 and np.abs(before - after).max() <= 1
    assert capsys.readouterr().out.count("is the same picture") == len(files)
