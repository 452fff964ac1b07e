"""A model folder with anything wrong in its weights or settings is refused in one line that lists it."""

import json
import random

import pytest
import torch
from hostile_weights import altered, copied
from models import CAPTIONS, variants
from safetensors.torch import load_file, save_file

from calotype import cli
from calotype.pipeline import hashes
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline

WEIGHTS = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "student": "student/diffusion_pytorch_model.safetensors",
    "tiny_decoder": "tiny_decoder/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def poisoned(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[len(tensor.view(-1)) // 2] = value
        return tensor

    return change


# Each takes the tensors and one name, changes them in place and returns the name that must be told.
def missing(tensors, name):
    del tensors[name]
    return name


def extra(tensors, name):
    tensors["not.asked.for"] = torch.ones(2)
    return "not.asked.for"


def renamed(tensors, name):
    tensors[f"{name}s"] = tensors.pop(name)
    return name


def with_nan(tensors, name):
    tensors[name] = poisoned(float("nan"))(tensors[name])
    return name


def infinite(tensors, name):
    tensors[name] = poisoned(float("-inf"))(tensors[name])
    return name


def longer(tensors, name):
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    return name.split(".")[-1]


def flat(tensors, name):
    tensors[name] = tensors[name].reshape(1, -1).contiguous()
    return name.split(".")[-1]


CHANGES = (missing, extra, renamed, with_nan, infinite, longer, flat)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for name, pipe in variants().items():
        if name in ("fast", "text"):
            pipe.save_pretrained(root / name)
            hashes.write(root / name)
    return root


def generate(model, out):
    label = CAPTIONS[0] if (model / "tokenizer").is_dir() else "red"
    return cli.main(["generate", str(model), label, "-n", "1", "--out", str(out), "--precision", "fp32"])


def refused(model, tmp_path, capsys):
    """The one line, after which nothing was drawn."""
    assert generate(model, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"MODEL {model}" in message and not (tmp_path / "out").exists(), message
    return message


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("part", WEIGHTS)
def test_mutated_weights_are_refused_by_name(saved, tmp_path, capsys, part, change):
    """Two tensors of each part in seven ways: seventy files, seventy refusals."""
    source = saved / ("text" if part == "text_encoder" else "fast")
    for where in (0.3, 0.9):
        model = copied(source, tmp_path / f"model {where}")
        file = model / WEIGHTS[part]
        tensors = load_file(file)
        names = sorted(name for name in tensors if tensors[name].ndim > 1)
        told = change(tensors, names[int(where * len(names))])
        save_file(tensors, file, metadata={"format": "pt"})
        assert told in refused(model, tmp_path, capsys)


def test_the_same_folders_are_drawn_with_if_nothing_is_wrong(saved, tmp_path):
    for name in ("fast", "text"):
        assert generate(copied(saved / name, tmp_path / name), tmp_path / f"{name} out") == 0
        assert generate(saved / name, tmp_path / f"{name} out") == 0


@pytest.mark.reliability
def test_any_flipped_bit_is_noticed(saved, tmp_path, capsys, sized):
    """Also in what no loader could know to be wrong: a weight, a name of a class, a line of the pipeline's code."""
    model, chance = saved / "fast", random.Random(0)
    files = sorted(
        file for file in model.rglob("*") if file.is_file() and file.name not in ("README.md", "sha256.json")
    )
    for _ in range(sized(30, 300)):
        file = chance.choice(files)
        before = file.read_bytes()
        place, bit = chance.randrange(len(before)), chance.randrange(8)
        file.write_bytes(before[:place] + bytes([before[place] ^ 1 << bit]) + before[place + 1 :])
        assert f"{file.relative_to(model).as_posix()} has changed since" in refused(model, tmp_path, capsys)
        file.write_bytes(before)
    assert generate(model, tmp_path / "out") == 0


@pytest.mark.parametrize(
    "content, reason",
    [
        (
            {"format": hashes.FORMAT + 1, "software": "calotype 99"},
            "written by calotype 99; this reads up to 1: update",
        ),
        ({"format": 0}, "has the format 0, which there is not"),
        ({"format": "1"}, "has the format '1', which there is not"),
        ({"files": 3}, "is damaged"),
        ({"files": {"../../etc/passwd": "0"}}, "lies outside the folder"),
        ({"files": {"unet/lost.safetensors": "0"}}, "unet/lost.safetensors is not there, but was when"),
    ],
)
def test_the_list_of_hashes(saved, tmp_path, capsys, content, reason):
    model = copied(saved / "fast", tmp_path / "model")
    hashes.write(model)
    altered(model / "sha256.json", **content)
    assert reason in refused(model, tmp_path, capsys)


@pytest.mark.parametrize(
    "file, more, reason",
    [
        ("unet/config.json", {"in_channels": 9}, "cannot be loaded"),
        ("model_index.json", {"condition": "inpaint"}, "unet.in_channels is 4 where the other parts give 9"),
        ("model_index.json", {"id2label": {"0": "red"}}, "unet.num_class_embeds is 3 where the other parts give 2"),
        ("model_index.json", {"id2label": {"1": "red", "2": "blue"}}, "do not make a model"),
        ("model_index.json", {"condition": "text"}, "does not go with text_encoder"),
        ("model_index.json", {"condition": "magic"}, "must be none, class, text"),
        ("model_index.json", {"default_steps": 0}, "num_inference_steps=0 must be"),
        ("model_index.json", {"default_guidance": 1e6}, "guidance_scale=1000000.0 must be"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "none that a model here has"),
        ("model_index.json", {"unet": [None, None]}, "has no unet"),
        ("scheduler/scheduler_config.json", {"_class_name": "UNet2DModel"}, "no scheduler of diffusers"),
        ("scheduler/scheduler_config.json", {"solver_type": "magic"}, "makes no scheduler"),
    ],
)
def test_settings_that_contradict_each_other(saved, tmp_path, capsys, file, more, reason):
    model = copied(saved / "fast", tmp_path / "model")
    altered(model / file, **more)
    assert reason in refused(model, tmp_path, capsys)


def test_stock_diffusers_passes_over_the_list(saved):
    assert json.loads((saved / "fast/sha256.json").read_text())["format"] == hashes.FORMAT
    assert LatentDiffusionPipeline.from_pretrained(saved / "fast").labels == ["red", "blue"]


def test_weights_that_are_not_finite_raise_before_there_is_a_picture():
    """Also where nobody looked when they were loaded: the step is named, and no picture is black."""
    from calotype.pipeline.order import NonFiniteLatents

    for part, step in (("unet", 1), ("vae", None), ("student", 1), ("tiny_decoder", None)):
        pipe = variants()["fast"]
        with torch.no_grad():
            next(getattr(pipe, part).parameters() if part != "vae" else pipe.vae.decoder.parameters()).fill_(
                float("nan")
            )
            next(pipe.tiny_decoder.decoder.parameters()).fill_(float("nan")) if part == "tiny_decoder" else None
        with pytest.raises(NonFiniteLatents, match="not finite") as raised:
            pipe("red", fast=part in ("student", "tiny_decoder"))
        assert raised.value.step == step and isinstance(raised.value, ValueError)
    pipe = variants()["class"]

    def late(_, step, __, kept):
        return {"latents": kept["latents"] * (float("nan") if step == 1 else 1)}

    with pytest.raises(NonFiniteLatents, match="the latents after step 2 are not finite"):
        pipe("red", num_inference_steps=4, callback_on_step_end=late)


@pytest.mark.reliability
def test_a_kept_feature_network_that_is_damaged_is_made_anew(finished, tmp_path, capsys):
    from calotype import own_features
    from calotype.sheet import read_sheet

    sheet = read_sheet(finished / "data.json")
    first = own_features.own(sheet, tmp_path / "own", "fp32").network.identity
    assert "trained in" in capsys.readouterr().out
    assert own_features.own(sheet, tmp_path / "own", "fp32").network.identity == first
    assert "trained in" not in capsys.readouterr().out
    for file, content in (("model.safetensors", b"junk"), ("config.json", b"[3]"), ("config.json", b"{")):
        (tmp_path / "own" / file).write_bytes(content)
        assert own_features.own(sheet, tmp_path / "own", "fp32").network.identity == first
        assert "trained in" in capsys.readouterr().out
