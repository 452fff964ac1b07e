"""The one policy for training and drawing: what it changes in a network, and what it must not."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch.testing import assert_close

from calotype import checkpoint, cli, device
from calotype.errors import UserError

UP = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
FLAT = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}


def unet():
    torch.manual_seed(0)
    widths = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8}
    return UNet2DModel(in_channels=4, out_channels=4, sample_size=8, num_class_embeds=3, **widths, **FLAT).eval()


def vae(width):
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(width, 2 * width), norm_num_groups=4, **UP).eval()


@torch.no_grad()
def drawn(network):
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with device.autocast("bf16"):
        return network(z, 5, torch.arange(3)).sample


def test_weights_that_are_cast_once_change_no_bit_under_autocast():
    plain, half = unet(), unet()
    device.for_drawing(plain, "fp32")
    device.for_drawing(half, "bf16")
    assert (
        half.conv_out.weight.dtype == torch.bfloat16 and half.conv_norm_out.weight.dtype == half.dtype == torch.float32
    )
    assert torch.equal(drawn(plain), drawn(half))


@pytest.mark.parametrize("width, last", [(32, False), (64, True)])
def test_a_wide_autoencoder_has_its_channels_last_and_says_the_same(width, last):
    plain, ours = vae(width), vae(width)
    device.for_drawing(ours, "bf16")
    if device.device().type == "cpu":
        assert ours.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last) == last
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), device.autocast("bf16"):
        assert_close(ours.decode(z).sample.float(), plain.decode(z).sample.float(), rtol=0.1, atol=0.05)


def test_drawing_in_the_precision_of_the_file_changes_no_bit(finished, tmp_path):
    """The same pictures as with weights in fp32 under autocast, which is how they were drawn before."""
    from calotype.pipeline.generate import load

    pictures = []
    for precision in ("fp32", "bf16"):
        pipe = load(finished, precision)
        with device.autocast("bf16"):
            pictures.append(pipe(None, 4, seed=3, output_type="pt").images)
    assert torch.equal(*pictures)


def test_nothing_is_compiled_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(UserError, match="--compile needs a C\\+\\+ compiler"):
        device.for_training(unet(), unet(), compiled=True)


def test_weights_in_another_memory_format_are_saved_resumed_and_exported(finished, tmp_path, monkeypatch):
    """As on a GPU, whose convolutions want channels last."""
    monkeypatch.setattr(device, "_memory_format", lambda: torch.channels_last)
    words = ["train-diffusion", "--latents", str(finished / "latents"), "--width", "16", "--batch-size", "8"]
    words += ["--precision", "fp32", "--validations", "1", "--kid-samples", "0", "--sampler-steps", "2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert cli.main([*words, "--steps", "6", "--out", str(whole)]) == 0
    for steps in ("3", "6"):
        more = ["--lr-schedule", "constant", "--warmup-steps", "0"]
        assert cli.main([*words, *more, "--steps", steps, "--out", str(halves)]) == 0
    assert UNet2DModel.from_pretrained(whole / "unet").conv_in.weight.is_contiguous()
    assert (checkpoint.load(whole / "checkpoints") or (0, {"step": 0}))[1]["step"] == 6
    assert (halves / "finished.json").is_file()


def test_a_network_trained_with_its_own_copy_is_untouched():
    network = unet()
    before = copy.deepcopy(network.state_dict())
    device.for_training(network)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.requires_grad for parameter in network.parameters())
