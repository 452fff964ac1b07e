"""Layouts that diffusers loads with no flag, and `export --verify` and `push` on a real run."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, VQModel
from models import CAPTIONS, pipeline, text_parts, text_unet, tiny_unet, tiny_vae

from calotype import cli
from calotype.errors import UserError
from calotype.pipeline.export import model_card
from calotype.pipeline.push import files_of, licence_of
from calotype.pipeline.stock import stock
from calotype.pipeline.verify import verify

NAMES = {"0": "red", "1": "blue"}


def models():
    return {
        "none": pipeline(tiny_unet(), default_guidance=1.0),
        "class": pipeline(tiny_unet(classes=2), id2label=NAMES),
        "class, VQ": pipeline(tiny_unet(classes=2), vae=tiny_vae(VQModel), id2label=NAMES),
        "text": pipeline(text_unet(), **text_parts()),
    }


@pytest.mark.parametrize("name", models())
def test_diffusers_own_pipelines_draw_the_same_with_no_flag(tmp_path, name):
    pipe = models()[name]
    stock(pipe).save_pretrained(tmp_path / "stock")
    again = DiffusionPipeline.from_pretrained(tmp_path / "stock")
    again.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    order = {"num_inference_steps": 5, "output_type": "np", "generator": generators}
    if name == "none":
        theirs, ours = again(2, **order).images, pipe(None, 2, seed=3, num_inference_steps=5, output_type="np").images
    else:
        told = CAPTIONS[:2] if name == "text" else ["blue", "red"]
        words = told if name == "text" else again.get_label_ids(told)
        theirs = again(words, guidance_scale=2.0, **order).images
        ours = pipe(told, seed=3, num_inference_steps=5, guidance_scale=2.0, output_type="np").images
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert np.abs(ours[0] - ours[1]).max() > 1e-3
    kinds = {type(part).__module__.partition(".")[0] for part in again.components.values() if part is not None}
    assert kinds <= {"diffusers", "transformers"}


def test_what_diffusers_has_no_pipeline_for_is_said():
    with pytest.raises(UserError, match="--stock: .*given picture .inpaint.; leave it out"):
        stock(pipeline(tiny_unet(9), condition="inpaint"))
    wide = tiny_unet()
    wide.register_to_config(sample_size=[8, 16])
    with pytest.raises(UserError, match="latents here are 8x16"):
        stock(pipeline(wide))


@pytest.mark.parametrize("words", [[], ["--stock"]])
def test_an_export_is_verified_by_diffusers_alone(finished, tmp_path, capsys, words):
    assert cli.main(["export", "--run", str(finished), "--out", str(tmp_path / "model"), "--verify", *words]) == 0
    assert "drawn by diffusers alone differ from ours by at most" in capsys.readouterr().out
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert (index["_class_name"] == "DiTPipeline") == bool(words)
    card = (tmp_path / "model/README.md").read_text()
    assert ("trust_remote_code" in card) != bool(words)


def test_a_folder_that_draws_something_else_does_not_pass(tmp_path):
    pipe, other = pipeline(tiny_unet(classes=2), id2label=NAMES), pipeline(tiny_unet(classes=2, seed=9), id2label=NAMES)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="--verify: diffusers alone draws other pictures"):
        verify(pipe, tmp_path / "other")
    (tmp_path / "other/unet/config.json").write_text("{}")
    with pytest.raises(UserError, match="--verify: diffusers alone cannot draw with"):
        verify(pipe, tmp_path / "other")


@pytest.mark.parametrize("condition", ["inpaint", "text"])
def test_models_that_are_told_more_are_verified_too(tmp_path, condition):
    pipe = (
        pipeline(tiny_unet(9), condition="inpaint") if condition == "inpaint" else pipeline(text_unet(), **text_parts())
    )
    pipe.save_pretrained(tmp_path / "model")
    assert verify(pipe, tmp_path / "model") < 1e-4


def test_the_card_says_how_a_stock_layout_is_drawn_with(finished):
    assert "pipe(4, num_inference_steps=3)" in model_card(models()["none"], finished, stock=True)
    assert "get_label_ids(['red'])" in model_card(models()["class"], finished, stock=True)


def test_push_without_a_connection_says_what_it_would_send(finished, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished / "pipeline", tmp_path / "model")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nobody"))
    words = ["push", str(tmp_path / "model"), "somebody/a-model"]
    assert cli.main([*words, "--dry-run", "--licence", "cc-by-4.0"]) == 0
    plan = json.loads((tmp_path / "model.push.json").read_text())
    assert plan["licence"] == "cc-by-4.0" == licence_of(tmp_path / "model/README.md")
    assert set(plan["files"]) == {str(file.relative_to(tmp_path / "model")) for file in files_of(tmp_path / "model")}
    assert {"pipeline.py", "order.py", "unet/diffusion_pytorch_model.safetensors", "samples.png"} <= set(plan["files"])
    assert "Nothing was sent" in capsys.readouterr().out
    card = (tmp_path / "model/README.md").read_text()
    assert card.count("license:") == 1 and "| psnr[val] |" in card
    (tmp_path / "model.push.json").unlink()
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment once, on import
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "somebody/a-model could not be reached" in error and error.count("\n") == 1
    assert (tmp_path / "model.push.json").is_file()


def test_push_sends_nothing_that_is_no_part_of_a_model(finished, tmp_path, capsys):
    shutil.copytree(finished / "pipeline", tmp_path / "model")
    (tmp_path / "model/diary.pdf").write_text("private")
    assert cli.main(["push", str(tmp_path / "model"), "somebody/a-model", "--dry-run"]) == 2
    assert "holds diary.pdf, which is no part of a model" in capsys.readouterr().err
