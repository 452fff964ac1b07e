"""The tab Run, and which tabs a page has."""

import json
import os

import pytest
import torch
from studios import EVIL, of_each_kind, png

from calotype.demo import page
from calotype.demo.run_folder import RunFolder, find_run


@pytest.fixture(scope="module")
def models():
    return of_each_kind()


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "prints"
    for stage in ("stage1_vae", "stage2_diffusion"):
        (folder / stage / "samples").mkdir(parents=True)
        add_rows(folder / stage, *({"step": step, "loss[train]": 1 / step} for step in range(1, 9)))
    (folder / "run.json").write_text(json.dumps({"commands": [{"name": "train-vae", "seconds": 3.0}]}))
    return folder


def add_rows(stage, *rows):
    with (stage / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_run_is_read_again_only_when_it_changed(run):
    folder = find_run(run)
    stamp, contents = folder.contents()
    assert folder.contents()[1] is contents and folder.stamp() == stamp
    assert "train-vae is running" in contents.heading and "step 8" in contents.heading
    assert "No complaints" in contents.heading and contents.charts.count("<svg") == 2
    add_rows(run / "stage2_diffusion", {"step": 9, "loss[train]": 0.1}, {"step": 9, "said": f"Latents are off {EVIL}"})
    assert folder.stamp() != stamp
    heading = folder.contents()[1].heading
    assert "step 9" in heading and "Latents are off &lt;img" in heading and "No complaints" not in heading
    old = os.stat(run / "run.json").st_mtime - 1000
    for stage in ("stage1_vae", "stage2_diffusion"):
        os.utime(run / stage / "metrics.jsonl", (old, old))
    assert "At rest in train-vae" in folder.contents()[1].heading


def test_the_films_show_whole_pictures_and_pass_over_torn_files(run):
    from calotype.images import image_grid

    pixels = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
    sheet = image_grid(pixels, 20, row_labels=["input", "output"])
    for step in range(1, 10):
        sheet.save(run / f"stage1_vae/samples/step-{step:08d}.png")
    (run / "stage1_vae/samples/step-00000005.png").write_bytes(png(sheet)[:300])
    films = RunFolder(run).contents()[1].films
    assert films.count("<figure") == 4 and ">9</figcaption>" in films and "Diffusion model" not in films
    from calotype.demo.run_folder import _frame

    frame = _frame(run / "stage1_vae/samples/step-00000001.png")
    assert frame.width < frame.height * 8 / 5 and frame.step == 1


def test_what_is_no_run_has_no_tab(run, tmp_path):
    (tmp_path / "model/pipeline").mkdir(parents=True)
    assert find_run(tmp_path / "model") is None and find_run(tmp_path / "nowhere") is None
    (run / "pipeline").mkdir()
    assert find_run(run / "pipeline").folder == run


def test_pages_have_the_tabs_that_their_models_can_serve(models, run):
    def tabs(*built):
        return [block.label for block in page.build(*built).blocks.values() if block.get_block_name() == "tabitem"]

    assert tabs(models["class"], "x") == ["Generate", "Edit", "Reconstruct", "Interpolate"]
    assert tabs(models["edges"], "x", find_run(run)) == ["Edit", "Reconstruct", "Run"]
    assert tabs(None, "x", find_run(run)) == ["Run"]
    for name, fact in (("superres", "from others 4 times smaller"), ("text", "by prompt"), ("class", "by 2 labels")):
        assert fact in page.masthead(models[name], "x")
    assert "no model to draw with yet" in page.masthead(None, "x")


def test_every_control_has_a_name(models):
    for name in ("text", "edges", "fast"):
        for block in page.build(models[name], "x").blocks.values():
            if block.get_block_name() in ("slider", "number", "dropdown", "textbox", "radio", "checkbox", "image"):
                assert block.label and getattr(block, "show_label", True) is not False
