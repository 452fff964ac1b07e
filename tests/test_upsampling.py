"""Enlarging in one transposed convolution: the same values and gradients as enlarging and convolving."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel, UNet2DModel
from torch.testing import assert_close

from calotype import upsampling
from calotype.upsampling import Enlarge, TransposedUpsample2D, speed_up

WIDTHS = {"block_out_channels": (8, 16), "norm_num_groups": 4}
UP = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
FLAT = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}


@pytest.fixture(autouse=True)
def small_as_they_are(monkeypatch):
    """Also where it does not pay."""
    monkeypatch.setattr(upsampling, "_FEWEST_TRAINED", 1)
    monkeypatch.setattr(upsampling, "_FEWEST_FROZEN", 1)


def vae():
    return AutoencoderKL(**WIDTHS, **UP)


def unet():
    return UNet2DModel(in_channels=4, out_channels=4, sample_size=8, **WIDTHS, **FLAT)


def conditional():
    return UNet2DConditionModel(cross_attention_dim=16, sample_size=8, **WIDTHS, **FLAT)


def tiny():
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**channels, **blocks)


def answer(network, side):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, side, side, generator=g)
    if isinstance(network, UNet2DConditionModel):
        return network(z, 5, torch.randn(2, 3, 16, generator=g)).sample
    if isinstance(network, UNet2DModel):
        return network(z, 5).sample
    return network.decode(z).sample


@pytest.mark.parametrize("side", [8, 7])
@pytest.mark.parametrize("make", [vae, unet, conditional, tiny])
def test_values_and_gradients_are_those_of_the_stock_network(make, side):
    torch.manual_seed(0)
    stock = make().eval()
    if side % 2 and isinstance(stock, UNet2DModel):
        pytest.skip("the stock network takes even sides only")
    ours = copy.deepcopy(stock)
    speed_up(ours)
    assert any(isinstance(module, (TransposedUpsample2D, Enlarge)) for module in ours.modules())
    assert_close(answer(ours, side), answer(stock, side), rtol=1e-4, atol=1e-5)
    answer(ours, side).square().mean().backward()
    answer(stock, side).square().mean().backward()
    for (name, one), other in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if other.grad is not None:
            assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_kept_kernel_follows_the_weights_and_the_precision():
    torch.manual_seed(0)
    ours = vae().eval().requires_grad_(False)
    speed_up(ours)
    with torch.no_grad():
        before = answer(ours, 8)
        for parameter in ours.decoder.parameters():
            parameter.mul_(1.1)
        stock = AutoencoderKL.from_config(ours.config).eval()
        stock.load_state_dict(ours.state_dict())
        assert not torch.allclose(answer(ours, 8), before, rtol=1e-2)
        assert_close(answer(ours, 8), answer(stock, 8), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(answer(ours, 8), answer(stock, 8), rtol=0.1, atol=0.1)
        assert_close(answer(ours, 8), answer(stock, 8), rtol=1e-4, atol=1e-5)
    half = ours.bfloat16()
    with torch.no_grad():
        assert answer_of(half).dtype == torch.bfloat16


def test_no_kernel_is_kept_while_an_optimiser_changes_the_weights():
    torch.manual_seed(0)
    ours = vae()
    speed_up(ours)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, fused=True)  # raises no version
    with torch.no_grad():
        before = answer(ours, 8)
    ours.decode(torch.randn(2, 4, 8, 8)).sample.square().mean().backward()
    optimizer.step()
    stock = AutoencoderKL.from_config(ours.config)
    stock.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert not torch.allclose(answer(ours, 8), before, rtol=1e-2)
        assert_close(answer(ours, 8), answer(stock, 8), rtol=1e-4, atol=1e-5)


def answer_of(network):
    return network.decode(torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)).sample


@pytest.mark.parametrize("make", [vae, unet, tiny])
def test_what_is_saved_is_the_stock_network(make, tmp_path):
    torch.manual_seed(0)
    ours = make().eval()
    speed_up(ours)
    with torch.no_grad():
        expected = answer(copy.deepcopy(ours), 8)
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path).eval()
    assert not any(isinstance(module, (TransposedUpsample2D, Enlarge)) for module in again.modules())
    assert_close(answer(again, 8), expected, rtol=1e-4, atol=1e-5)
