"""`calotype generate` and `calotype export` for models that are told more than a class."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from models import CAPTIONS, pipeline, text_parts, text_unet, tiny_unet, variants
from PIL import Image

from calotype import cli
from calotype.checkpoint import weights_hash
from calotype.pipeline import LatentDiffusionPipeline
from calotype.pipeline.export import assemble, model_card
from calotype.pipeline.sample_sheet import sample_sheet


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for name, pipe in variants().items():
        pipe.save_pretrained(root / name)
    for i, size in enumerate([(16, 16), (30, 20)]):
        (root / "photographs").mkdir(exist_ok=True)
        Image.new("RGB", size, (40 * i, 90, 200)).save(root / "photographs" / f"photo {i}.jpg")
    Image.fromarray(np.tri(16, dtype=np.uint8) * 255).save(root / "mask.png")
    return root


def generate(model, out, *words):
    return cli.main(["generate", str(model), *map(str, words), "--out", str(out), "--precision", "fp32"])


def test_each_picture_of_a_folder_once_and_under_its_name(saved, tmp_path):
    words = ["--image", saved / "photographs", "--mask", saved / "mask.png", "--seed", 3]
    assert generate(saved / "inpaint", tmp_path, *words) == 0
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["photo 0.png", "photo 1.png"]
    pipe = LatentDiffusionPipeline.from_pretrained(saved / "inpaint")
    given = Image.open(saved / "photographs/photo 0.jpg").convert("RGB")
    again = pipe(image=given, mask=Image.open(saved / "mask.png"), seed=3).images[0]
    assert np.abs(np.asarray(Image.open(files[0]), dtype=int) - np.asarray(again, dtype=int)).max() <= 1
    assert Image.open(files[1]).text["calotype:seed"] == "4"


def test_several_of_one_picture_carry_their_seeds(saved, tmp_path):
    words = ["blue", "--image", saved / "photographs/photo 1.jpg", "-n", 2]
    assert generate(saved / "superres", tmp_path, *words) == 0
    names = ["photo 1-00000000.png", "photo 1-00000001.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert Image.open(tmp_path / names[0]).text["calotype:label"] == "blue"


def test_a_prompt_a_sampler_and_the_short_way(saved, tmp_path):
    assert generate(saved / "text", tmp_path / "text", CAPTIONS[0], "-n", 2, "--guidance-interval", 0.1, 0.9) == 0
    facts = Image.open(tmp_path / "text/00000001.png").text
    assert facts["calotype:label"] == CAPTIONS[0] and facts["calotype:sampler"] == "UniPCMultistepScheduler"
    assert generate(saved / "class", tmp_path / "class", "red", "-n", 1, "--sampler", "flow-heun") == 0
    assert Image.open(tmp_path / "class/00000000.png").text["calotype:sampler"] == "flow-heun"
    assert generate(saved / "fast", tmp_path / "fast", "red", "-n", 1, "--fast") == 0
    facts = Image.open(tmp_path / "fast/00000000.png").text
    assert (facts["calotype:steps"], facts["calotype:guidance"]) == ("2", "built in")
    assert facts["calotype:model"] == weights_hash(saved / "fast/student")[:16]


@pytest.mark.parametrize(
    "model, words, message",
    [
        ("text", [], "give a prompt"),
        ("edges", [], "--image"),
        ("inpaint", ["--image", "photographs"], "give --mask too"),
        ("class", ["--image", "photographs"], "leave --image out"),
        ("edges", ["--image", "nothing.png"], "--image"),
        ("class", ["--fast"], "calotype distill"),
        ("class", ["--sampler", "dpm"], "--sampler 'dpm' must be one of"),
        ("fast", ["--fast", "--guidance", "2"], "--guidance 2.0 does not go with --fast;"),
        ("class", ["--guidance-interval", "0.5", "2"], "--guidance-interval 0.5 2 must be"),
    ],
)
def test_generate_refuses_with_one_line(saved, tmp_path, capsys, model, words, message):
    words = [str(saved / word) if (word.endswith(".png") or word == "photographs") else word for word in words]
    assert generate(saved / model, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def replace_unet(run, unet, **facts):
    """What a training with other inputs leaves behind."""
    unet.save_pretrained(run / "stage2_diffusion/unet")
    file = run / "stage2_diffusion/model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def test_export_puts_text_parts_student_and_guide_together(run, tmp_path):
    replace_unet(run, text_unet(), id2label={}, condition="text", prompts=CAPTIONS)
    for name, part in text_parts().items():
        part.save_pretrained(run / "stage2_diffusion" / name)
    text_unet(seed=8).save_pretrained(run / "distilled/student")
    FlowMatchEulerDiscreteScheduler().save_pretrained(run / "distilled/student_scheduler")
    (run / "distilled/distilled.json").write_text('{"steps": 3}')
    text_unet(seed=9).save_pretrained(tmp_path / "guide/unet")
    model = tmp_path / "model"
    assert cli.main(["export", "--run", str(run), "--out", str(model), "--guide", str(tmp_path / "guide")]) == 0
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    assert (pipe.condition, pipe.config.student_steps, pipe.takes_image) == ("text", 3, False)
    assert pipe.student is not None and pipe.guide is not None
    card = (model / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and "trust_remote_code" not in card
    assert Image.open(model / "samples.png").width > 300
    texts = [f.read_text() for f in model.rglob("*") if f.suffix in {".json", ".md", ".txt"}]
    assert not any(str(tmp_path) in text for text in texts)  # no path of this machine is published


@pytest.mark.parametrize("condition, channels", [("inpaint", 9), ("superres:4", 8), ("edges", 8)])
def test_the_sheet_of_a_model_of_pictures_shows_what_was_given(run, condition, channels):
    replace_unet(run, tiny_unet(channels), id2label={}, condition=condition)
    pipe = assemble(run)
    sheet = sample_sheet(pipe, run, seed=0)
    held_out = json.loads((run / "data.json").read_text())["counts"]["val"]
    assert pipe.latent_shape == (4, 8, 8) and sheet.width // sheet.height == held_out // 2
    card = model_card(pipe, run)
    assert "pipeline_tag: image-to-image" in card and f"({condition})" in card and "image=picture" in card


def test_export_refuses_a_guide_with_other_inputs(run, tmp_path, capsys):
    tiny_unet(9).save_pretrained(tmp_path / "guide")
    words = ["export", "--run", str(run), "--out", str(tmp_path / "model"), "--guide"]
    assert cli.main([*words, str(tmp_path / "guide")]) == 2
    assert "its in_channels is 9, the model's 4" in capsys.readouterr().err
    assert cli.main([*words, str(tmp_path)]) == 2
    assert "holds no UNet" in capsys.readouterr().err
    assert cli.main([*words, str(run)]) == 0
    assert (tmp_path / "model/guide/config.json").is_file()


def test_an_old_model_folder_still_loads(finished, tmp_path):
    """Before conditions had names, model_index.json did not hold them."""
    shutil.copytree(finished / "pipeline", tmp_path / "old")
    file = tmp_path / "old/model_index.json"
    index = json.loads(file.read_text())
    for name in ("condition", "sampler", "student_steps"):
        index.pop(name)
    file.write_text(json.dumps(index))
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "old")
    assert pipe.condition == "class" and pipe.config.student_steps == 4
    assert isinstance(pipe.unet, UNet2DModel) and torch.isfinite(pipe(output_type="pt").images).all()


def test_the_default_sampler_may_be_named():
    named, plain = pipeline(tiny_unet(), sampler="ddim"), pipeline(tiny_unet(), sampler="ddim")
    named.register_to_config(sampler="heun")
    assert len(list(named.stream())) == 5 and len(list(plain.stream())) == 3


def test_the_flags_have_the_limits_of_the_order():
    """The command line refuses before torch is imported; what it lets by is what the pipeline lets by."""
    from calotype.pipeline.config import GenerateSettings
    from calotype.pipeline.order import MOST, TIMES

    def most(name):
        limits = GenerateSettings.model_fields[name].metadata
        return max(getattr(limit, "le", None) or getattr(limit, "lt", 0) - 1 for limit in limits)

    assert MOST.steps == TIMES
    found = {name: most(name) for name in ("batch_size", "steps", "guidance", "guidance_rescale", "seed")}
    wanted = {"batch_size": MOST.images, "steps": MOST.steps, "guidance": MOST.guidance, "guidance_rescale": 1}
    assert found == wanted | {"seed": MOST.seed}
