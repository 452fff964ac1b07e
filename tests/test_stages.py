"""What the two stages do beyond the loop: odd shapes, no labels, starting from weights, trackers, averages."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from calotype import checkpoint, cli, shapes
from calotype.pipeline import LatentDiffusionPipeline

SHORT = "--steps 6 --batch-size 8 --precision fp32 --validations 1".split()


def diffusion(finished, out, *more):
    latents = ["--latents", str(finished / "latents"), "--vae", str(finished / "stage1_vae/vae")]
    return ["train-diffusion", *latents, "--width", "16", "--sampler-steps", "4", *SHORT, "--out", str(out), *more]


def test_flat_oblong_grey_pictures_make_an_unconditional_model(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        shapes.render(shapes.draw_factors(0, i, shapes.PLAIN), (24, 16)).convert("L").save(folder / f"{i}.png")
    out = tmp_path / "run"
    flags = ["--image-size", "24x16", "--factor", "2", *SHORT[:-2], "--out", str(out)]
    assert cli.main(["run", str(folder), *flags]) == 0
    pipe = LatentDiffusionPipeline.from_pretrained(out / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == [] and pipe.image_size == (24, 16) and pipe.image_channels == 1
    image = pipe(num_images=1, num_inference_steps=3).images[0]
    assert image.size == (16, 24) and image.mode == "L"
    with pytest.raises(ValueError, match="trained without labels"):
        pipe("red", 1)


def test_labels_can_be_ignored(finished, tmp_path):
    assert cli.main(diffusion(finished, tmp_path / "s2", "--condition", "none")) == 0
    assert UNet2DModel.from_pretrained(tmp_path / "s2/unet").config.num_class_embeds is None


def test_the_saved_weights_are_the_average_and_the_checkpoint_has_both(finished, tmp_path):
    assert cli.main(diffusion(finished, tmp_path / "s2")) == 0
    saved = load_file(tmp_path / "s2/unet/diffusion_pytorch_model.safetensors")
    parts, _ = checkpoint.load(tmp_path / "s2/checkpoints")
    assert all(torch.equal(saved[name], parts["unet_ema"][name]) for name in saved)
    assert any(not torch.equal(parts["unet"][name], parts["unet_ema"][name]) for name in saved)


def test_training_goes_on_from_a_trained_unet(finished, tmp_path, capsys):
    more = ["--init", str(finished), "--steps", "0"]
    assert cli.main(diffusion(finished, tmp_path / "s2", *more)) == 0
    theirs = load_file(finished / "stage2_diffusion/unet/diffusion_pytorch_model.safetensors")
    ours = load_file(tmp_path / "s2/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert cli.main(diffusion(finished, tmp_path / "s3", *more, "--condition", "none")) == 2
    assert "--init" in capsys.readouterr().err
    assert cli.main(diffusion(finished, tmp_path / "s3", "--init", str(tmp_path))) == 2
    assert f"--init {tmp_path}" in capsys.readouterr().err


def test_there_are_no_more_levels_than_the_latents_can_be_halved(finished, tmp_path):
    from calotype.stage2_diffusion import models
    from calotype.stage2_diffusion.config import DiffusionSettings

    settings = DiffusionSettings(out="", latents="", depth=5, width=16)
    depths = {(8, 8): 4, (7, 7): 1, (12, 8): 3, (6, 12): 2}
    for side, depth in depths.items():
        unet = models.build(settings, models.Inputs((2, *side), classes=3))
        assert len(unet.config.block_out_channels) == depth
        assert unet(torch.zeros(1, 2, *side), 0, class_labels=torch.tensor([0])).sample.shape == (1, 2, *side)


def test_a_unet_that_goes_on_takes_the_size_of_the_new_latents(finished, tmp_path):
    from calotype.stage2_diffusion import models
    from calotype.stage2_diffusion.config import DiffusionSettings

    settings = DiffusionSettings(out="", latents="", init=finished)
    assert models.build(settings, models.Inputs((4, 16, 12), classes=8)).config.sample_size == [16, 12]
    with pytest.raises(ValueError, match="--init .* do not divide latents of 7x7"):
        models.build(settings, models.Inputs((4, 7, 7), classes=8))


@pytest.mark.parametrize("regularizer, log_variance", [("none", -30.0), ("kl", 2 * np.log(0.2))])
def test_the_saved_encoder_reports_the_variance_it_was_trained_with(finished, tmp_path, regularizer, log_variance):
    out = tmp_path / "vae"
    flags = ["--width", "8", "--factor", "2", *SHORT, "--regularizer", regularizer]
    flags += ["--posterior-std", "0.2"] if regularizer == "kl" else []
    assert cli.main(["train-vae", str(finished / "data.json"), *flags, "--out", str(out)]) == 0
    weights = load_file(out / "vae/diffusion_pytorch_model.safetensors")
    assert (weights["quant_conv.weight"][4:] == 0).all()
    folded = weights["quant_conv.bias"][4:]  # log-variance less twice the log of each channel's deviation
    parts, _ = checkpoint.load(out / "checkpoints")
    scale = parts["vae"]["quant_conv.weight"][:4] / weights["quant_conv.weight"][:4]
    expected = log_variance - 2 * scale.flatten(1).median(1).values.log()
    torch.testing.assert_close(folded, expected.float(), atol=1e-3, rtol=1e-3)


def test_a_tracker_that_is_not_there_is_named(finished, tmp_path, capsys):
    assert cli.main(diffusion(finished, tmp_path / "s2", "--trackers", "wandbb")) == 2
    assert "--trackers wandbb" in capsys.readouterr().err and not (tmp_path / "s2").exists()


def test_trackers_of_accelerate_are_told(finished, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install 'calotype[track]'")
    assert cli.main(diffusion(finished, tmp_path / "s2", "--trackers", "tensorboard", "--log-every", "2")) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = next((tmp_path / "s2").rglob("events.out.tfevents*"))
    events = EventAccumulator(str(file.parent))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "s2/metrics.jsonl").read_text().splitlines()]
    expected = [line["loss[train]"] for line in lines if "loss[train]" in line]
    assert [event.value for event in events.Scalars("loss[train]")] == pytest.approx(expected)


@pytest.mark.parametrize("source", ["shapes", "folder"])
def test_a_stage_alone_reads_its_source_once(pictures, tmp_path, source, monkeypatch, capsys):
    source = str(pictures) if source == "folder" else source
    words = ["train-vae", source, "--image-size", "16", "--width", "8", "--factor", "2", *SHORT, "--out"]
    assert cli.main([*words, str(tmp_path / "vae")]) == 0
    from calotype import sheet

    monkeypatch.setattr(sheet, "make_sheet", lambda *_: pytest.fail("read again"))
    assert cli.main([*words, str(tmp_path / "vae")]) == 0
    words[1] = "elsewhere"
    assert cli.main([*words, str(tmp_path / "vae")]) == 2
    assert "holds the data sheet of" in capsys.readouterr().err


def test_a_size_that_does_not_divide_leaves_nothing_behind(pictures, tmp_path, capsys):
    words = ["--image-size", "18", "--factor", "4", "--steps", "1", "--out", str(tmp_path / "vae")]
    assert cli.main(["train-vae", str(pictures), *words]) == 2
    message = capsys.readouterr().err
    assert "--image-size 18 must" in message and "try 16." in message
    assert not (tmp_path / "vae").exists()


def test_sample_sheets_are_pictures(finished):
    for stage in ("stage1_vae", "stage2_diffusion"):
        sheets = sorted((finished / stage / "samples").glob("*.png"))
        assert len(sheets) == 2
        assert np.asarray(Image.open(sheets[-1])).std() > 5


def train_vae(source, out, *more):
    """Train for a few steps; returns the figures of the last validation."""
    words = ["train-vae", str(source), "--width", "8", *SHORT, "--out", str(out), *more]
    assert cli.main(words) == 0
    return json.loads((out / "finished.json").read_text())


def test_a_picture_becomes_two_numbers(tmp_path):
    """Pictures of 12x12 are padded to 16 inside, and cropped; a code of two numbers is a latent of 1x1."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        shapes.render(shapes.draw_factors(0, i, shapes.PLAIN), (12, 12)).convert("L").save(folder / f"{i}.png")
    assert cli.main(["data", str(folder), "--image-size", "12", "--out", str(tmp_path)]) == 0
    train_vae(tmp_path / "data.json", tmp_path / "vae", "--latent-dim", "2")
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tmp_path / "vae/vae").eval()
    assert vae.encode(torch.zeros(3, 1, 16, 16)).latent_dist.mean.shape == (3, 2, 1, 1)
    assert vae.decode(torch.zeros(3, 2, 1, 1)).sample.shape == (3, 1, 16, 16)
    from calotype.autoencoder import decode, posterior

    x = torch.rand(3, 1, 12, 12) * 2 - 1
    z = posterior(vae, x)["mean"]
    border = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
    torch.testing.assert_close(z, vae.encode(border).latent_dist.mean)
    torch.testing.assert_close(decode(vae, z, (12, 12)), vae.decode(z).sample[:, :, 2:14, 2:14])
    out = str(tmp_path / "latents")
    assert cli.main(["encode", str(tmp_path / "data.json"), "--vae", str(tmp_path / "vae/vae"), "--out", out]) == 0


def test_a_denoiser_is_judged_on_damaged_pictures(finished, tmp_path):
    found = train_vae(finished / "data.json", tmp_path / "vae", "--factor", "2", "--corruption", "gaussian:0.3")
    assert {"psnr[val]", "psnr_damaged[val]", "psnr_denoised[val]", "active_units[val]"} <= set(found)
    # noise of deviation 0.3 on a range of 2; clamping takes some of it away
    assert 16.5 < found["psnr_damaged[val]"] < 19.5


@pytest.mark.parametrize("words, codes", [(["vq", "--codebook", "32"], 32), (["fsq", "--levels", "4,3"], 12)])
def test_codes_are_counted_and_exported(finished, tmp_path, words, codes):
    found = train_vae(finished / "data.json", tmp_path / "vae", "--factor", "2", "--regularizer", *words)
    assert 0 < found["code_usage[val]"] <= 1 and 1 <= found["perplexity[val]"] <= codes
    from diffusers import VQModel

    vae = VQModel.from_pretrained(tmp_path / "vae/vae")
    assert vae.config.num_vq_embeddings == codes and vae.config.scaling_factor == 1.0
    parts, _ = checkpoint.load(tmp_path / "vae/checkpoints")
    assert ("codebook" in parts) == (words[0] == "vq")


def test_a_code_may_have_more_numbers_than_pictures_that_start_it():
    from calotype.stage1_vae import models, start
    from calotype.stage1_vae.config import VaeSettings

    settings = VaeSettings(source="", out="", width=8, latent_dim=96)
    model = models.build(settings, channels=1, size=(16, 16))
    torch.manual_seed(0)
    x = torch.rand(40, 1, 16, 16) * 2 - 1
    start.prepare(model, x, seed=0)
    with torch.no_grad():
        mean = model.encode(x)[:, :96]
        # The same code but for rounding: nothing was amplified that tells no picture from another.
        other = model.encode(x + 1e-4 * torch.randn_like(x))[:, :96]
    torch.testing.assert_close(mean.std(0).flatten(), torch.ones(96), atol=1e-2, rtol=0)
    assert (other - mean).abs().max() < 0.05


def test_a_thousand_classes_keep_their_names(tmp_path):
    """The null class is the row after the last; names come back in the order of the ids."""
    folder = tmp_path / "pictures"
    for i in range(1000):
        (folder / f"kind {i}").mkdir(parents=True)
        Image.new("L", (8, 8), i % 256).save(folder / f"kind {i}/a.png")
    out = tmp_path / "run"
    sheet, vae, latents = (str(out / name) for name in ("data.json", "stage1_vae", "latents"))
    for argv in (
        ["data", str(folder), "--image-size", "8", "--val", "0.02", "--out", str(out)],
        ["train-vae", sheet, "--width", "8", "--factor", "2", *SHORT, "--out", vae],
        ["encode", sheet, "--vae", f"{vae}/vae", "--out", latents],
        ["train-diffusion", "--latents", latents, "--width", "16", *SHORT, "--out", str(out / "stage2_diffusion")],
        ["export", "--run", str(out)],
    ):
        assert cli.main(argv) == 0
    pipe = LatentDiffusionPipeline.from_pretrained(out / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.config.num_class_embeds == 1001
    names = sorted(f"kind {i}" for i in range(1000))
    assert pipe.labels == names
    by_name = pipe("kind 999", 1, num_inference_steps=2, output_type="np").images
    assert (by_name == pipe(names.index("kind 999"), 1, num_inference_steps=2, output_type="np").images).all()


def test_the_distance_of_samples_is_written_down_unless_it_is_not_wanted(finished, tmp_path):
    def figures(name, *more):
        assert cli.main(diffusion(finished, tmp_path / name, *more)) == 0
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line["kid[encoder]"] for line in lines if "kid[encoder]" in line]

    first = figures("a")
    assert len(first) == 1 and np.isfinite(first[0])
    assert figures("b") == first
    assert figures("c", "--kid-samples", "0") == []


@pytest.mark.parametrize("text_width", [0, 32])
def test_a_new_unet_says_nothing_yet(text_width):
    """Its blocks are the identity and its output is 0, so that the first gradients are small and sound."""
    from calotype.stage2_diffusion import models
    from calotype.stage2_diffusion.config import DiffusionSettings

    unet = models.build(
        DiffusionSettings(out="", latents="", width=16), models.Inputs((2, 4, 4), text_width=text_width)
    )
    text = {"encoder_hidden_states": torch.randn(3, 5, 32)} if text_width else {}
    said = unet(torch.randn(3, 2, 4, 4), torch.tensor([1, 500, 999]), **text).sample
    assert (said == 0).all()
    assert all((module.conv2.weight == 0).all() for module in unet.modules() if hasattr(module, "conv2"))
    assert unet.config.resnet_time_scale_shift == ("default" if text_width else "scale_shift")
