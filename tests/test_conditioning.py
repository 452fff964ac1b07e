"""Text and pictures as conditions: what the network is given, what it must not know, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from benchmarks.tiny import CONDITIONS, diffusion_flags, vae_flags, write_pictures
from calotype import cli
from calotype.data import Batch
from calotype.device import accelerator
from calotype.images import normalize
from calotype.latents import mirrored
from calotype.pipeline.pictures import degrade, encode
from calotype.stage2_diffusion import text
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.masks import random_masks
from calotype.stage2_diffusion.train import DiffusionStage

SHORT = "--steps 4 --validations 1 --checkpoint-every 2".split()


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """RUN/data.json, vae/vae and latents of small pictures with captions and classes; flipped/ holds mirror images."""
    out = tmp_path_factory.mktemp("captioned")
    pictures = write_pictures(out / "pictures")
    flat = write_pictures(out / "flat")
    for file in flat.rglob("*.txt"):
        file.unlink()
    sheet, vae = out / "data.json", out / "vae/vae"
    for argv in (
        ["data", str(pictures), "--image-size", "16", "--out", str(out)],
        vae_flags(sheet, out / "vae", "--steps", "10", "--validations", "1"),
        ["encode", str(sheet), "--vae", str(vae), "--out", str(out / "latents")],
        ["data", str(flat), "--image-size", "16", "--out", str(out / "mirror")],
        ["encode", str(out / "mirror/data.json"), "--vae", str(vae), "--flip", "--out", str(out / "mirror/latents")],
    ):
        assert cli.main(argv) == 0, argv
    return out


def stage(captioned, condition, latents="latents", **more):
    settings = DiffusionSettings(
        out="", latents=captioned / latents, width=16, batch_size=8, precision="fp32", condition=condition, **more
    )
    return DiffusionStage(settings, captioned / "vae/vae", accelerator("fp32"))


def train(captioned, out, *more, latents="latents"):
    return cli.main(diffusion_flags(captioned / latents, captioned / "vae/vae", out, *SHORT, *more))


# Masks


def test_masks_follow_from_the_position_and_cover_all_kinds():
    masks = random_masks(0, "train", 0, 2000, (16, 24))
    assert masks.shape == (2000, 1, 16, 24) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masks[500:600], random_masks(0, "train", 500, 100, (16, 24)))
    share = masks.mean((1, 2, 3))
    assert 0.05 < (share == 1).float().mean() < 0.15  # all is new
    corners = masks[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].sum(1) == 4
    assert 0.25 < corners.float().mean() < 0.5  # all of the border
    assert share.min() > 0.02 and 0.3 < share.mean() < 0.6


# Text


CAPTIONS = ["a red star at the top left", "a blue heart in the middle", "a red heart"]


def test_a_tokenizer_is_always_the_same_and_knows_every_character():
    first, second = text.train_tokenizer(CAPTIONS), text.train_tokenizer(iter(CAPTIONS))
    assert first.get_vocab() == second.get_vocab()
    assert first.model_max_length == 16  # nine words with the two ends, rounded up
    strange = first("a RED star, größe 早!").input_ids
    assert strange.count(first.eos_token_id) == 1 == strange.count(first.bos_token_id)
    assert first.decode(strange, skip_special_tokens=True).replace(" ", "") == "aredstar,größe早!"
    assert first("A red  STAR").input_ids == first("a red star").input_ids
    assert len(first("a red star").input_ids) == 5


def test_a_saved_tokenizer_reads_the_same(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = text.train_tokenizer(CAPTIONS)
    text.save_tokenizer(tokenizer, tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 16 and (tmp_path / "merges.txt").is_file()
    for caption in (*CAPTIONS, "", "unheard of"):
        assert torch.equal(text.tokens(loaded, [caption]), text.tokens(tokenizer, [caption]))


def test_captions_become_tokens_and_some_are_hidden(captioned):
    text_stage = stage(captioned, "text")
    batch = next(text_stage.batches(3))
    shown = text_stage.condition.of(batch, "train", 0.0).tokens
    captions = [text_stage.cache.caption(item) for item in batch.item.tolist()]
    tokenizer = text_stage.condition.tokenizer
    assert [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in shown] == captions
    empty = text.tokens(tokenizer, [""])[0]
    many = Batch(batch.x[:1].expand(4000, -1, -1, -1), batch.label[:1].expand(4000), 0, batch.item[:1].expand(4000))
    hidden = (text_stage.condition.of(many, "train", 0.1).tokens == empty).all(1)
    assert abs(hidden.float().mean() - 0.1) < 0.02


def test_the_loss_of_a_caption_reaches_the_text_encoder(captioned):
    text_stage = stage(captioned, "text")
    for parameter in text_stage.net.unet.parameters():  # the last layers begin at 0 and would let nothing through
        parameter.data += 0.01
    text_stage.backward(next(text_stage.batches(0)), 0)
    still = {n for n, p in text_stage.net.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert still == set()


def test_a_given_text_encoder_is_used_and_left_as_it_is(captioned, tmp_path, capsys):
    assert train(captioned, tmp_path / "a", "--condition", "text", "--text-width", "32", "--text-layers", "1") == 0
    more = ["--condition", "text", "--text-encoder", str(tmp_path / "a")]
    assert train(captioned, tmp_path / "b", *more) == 0
    name = "text_encoder/model.safetensors"
    given, used = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
    assert all(torch.equal(given[key], used[key]) for key in given)
    assert not (tmp_path / "b/checkpoints/step-00000004/text_encoder.safetensors").exists()
    assert train(captioned, tmp_path / "c", "--condition", "text", "--text-encoder", str(captioned)) == 2
    assert "--text-encoder" in capsys.readouterr().err and not (tmp_path / "c").exists()
    assert train(captioned, tmp_path / "c", "--text-encoder", str(tmp_path / "a")) == 2
    assert "--text-encoder" in capsys.readouterr().err


def test_a_text_model_is_trained_further(captioned, tmp_path):
    words = ["--condition", "text", "--text-width", "32", "--text-layers", "1"]
    assert train(captioned, tmp_path / "a", *words) == 0
    assert train(captioned, tmp_path / "b", *words[:2], "--init", str(tmp_path / "a"), "--steps", "0") == 0
    for name in ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        first, second = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_text_is_refused_with_mirror_images_and_without_captions(captioned, tmp_path, capsys):
    assert train(captioned, tmp_path / "a", "--condition", "text", latents="mirror/latents") == 2
    assert "holds mirror images" in capsys.readouterr().err
    words = ["encode", str(captioned / "mirror/data.json"), "--vae", str(captioned / "vae/vae")]
    assert cli.main([*words, "--out", str(tmp_path / "latents")]) == 0
    flags = ["--condition", "text", "--latents", str(tmp_path / "latents")]
    assert train(captioned, tmp_path / "a", *flags) == 2
    assert "no picture has a caption" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


# Pictures


@pytest.mark.parametrize("condition", ["inpaint", "superres:2", "edges"])
def test_the_given_latents_are_those_of_the_given_picture(captioned, condition):
    there = stage(captioned, condition)
    batch = next(there.batches(1))
    given = there.condition.of(batch, "train", 0.0)
    assert (given.label == batch.label).all()
    x = normalize(torch.stack([there.condition.pictures["train"][item] for item in batch.item.tolist()]))
    vae = there.vae()
    with torch.no_grad():
        if condition != "inpaint":
            assert_close(given.latents, encode(vae, degrade(condition, x)))
            return
        mask = random_masks(0, "train", batch.start, len(x), (16, 16))
        assert_close(given.latents[:, :-1], encode(vae, x * (1 - mask)))
    assert torch.equal(given.latents[:, -1:], torch.nn.functional.max_pool2d(mask, 2))


def test_what_is_in_the_hole_is_not_given_away(captioned):
    there = stage(captioned, "inpaint")
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    mask = there.condition.masks("train", 40, 4)
    other = torch.where(mask > 0.5, -x, x)
    assert not torch.equal(x, other)
    assert torch.equal(there.condition.encode(x, mask), there.condition.encode(other, mask))


def test_a_mirrored_latent_is_given_a_mirrored_picture(captioned):
    settings = {"latents": "mirror/latents", "data": captioned / "mirror/data.json"}
    there = stage(captioned, "edges", **settings)
    batch = next(there.batches(0))
    flipped = mirrored(0, batch.start, 8)
    assert 0 < flipped.sum() < 8
    x = normalize(torch.stack([there.condition.pictures["train"][item] for item in batch.item.tolist()]))
    x[flipped] = x[flipped].flip(-1)
    with torch.no_grad():
        assert_close(there.condition.of(batch, "train", 0.0).latents, encode(there.vae(), degrade("edges", x)))


def test_pictures_of_another_sheet_are_refused(captioned, tmp_path, capsys):
    words = ["--condition", "edges", "--data", str(captioned / "mirror/data.json")]
    assert train(captioned, tmp_path / "a", *words) == 2
    assert "--data" in capsys.readouterr().err and not (tmp_path / "a").exists()


@pytest.mark.parametrize("condition", ["sketch", "superres:3"])
def test_a_condition_that_does_not_exist_is_named(captioned, tmp_path, capsys, condition):
    assert train(captioned, tmp_path / "a", "--condition", condition) == 2
    assert f"--condition {condition}" in capsys.readouterr().err


@pytest.mark.parametrize("condition", [name for name in CONDITIONS if name not in ("class", "options", "muon")])
def test_every_condition_trains_exports_and_draws(captioned, tmp_path, condition):
    out = tmp_path / "run"
    assert train(captioned, out / "stage2_diffusion", *CONDITIONS[condition]) == 0
    assert len(list((out / "stage2_diffusion/samples").glob("*.png"))) == 1
    facts = json.loads((out / "stage2_diffusion/model.json").read_text())
    assert facts["condition"] == CONDITIONS[condition][1]
    (out / "stage1_vae").mkdir()
    (out / "stage1_vae/vae").symlink_to(captioned / "vae/vae")
    for name in ("data.json", "manifest.jsonl"):
        (out / name).symlink_to(captioned / name)
    assert cli.main(["export", "--run", str(out)]) == 0
    words = ["generate", str(out), "-n", "2", "--out", str(tmp_path / "samples"), "--precision", "fp32"]
    if condition == "text":
        words.insert(2, "a red star")
    else:
        from PIL import Image

        side = 8 if condition == "superres" else 16
        Image.new("RGB", (side, side), "red").save(tmp_path / "given.png")
        words += ["--image", str(tmp_path / "given.png")]
        if condition == "inpaint":
            Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
            words += ["--mask", str(tmp_path / "mask.png")]
    assert cli.main(words) == 0
    assert len(list((tmp_path / "samples").rglob("*.png"))) == 2
