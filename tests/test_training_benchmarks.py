"""What the benchmarks of training measure with, on quantities that are known."""

import xml.etree.ElementTree as xml

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from PIL import Image
from torch.testing import assert_close

from benchmarks.growth import Point, exponent
from benchmarks.growth_plot import write_plot
from benchmarks.memory import bytes_of, peak
from benchmarks.stage2_baselines import Diffusers, Original

MEGABYTE = 2**20


def work():
    a = torch.empty(MEGABYTE, dtype=torch.uint8)
    b = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
    del a
    return b, torch.empty(4 * MEGABYTE, dtype=torch.uint8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts on the CPU")
def test_the_peak_is_the_most_that_is_held_at_a_time():
    assert peak(work) == 6 * MEGABYTE


def test_a_storage_counts_once():
    whole = torch.zeros(100)
    assert bytes_of([whole, whole[:10]], [torch.zeros(5, dtype=torch.float64)]) == 400 + 40


def test_an_exponent_is_the_power_of_the_work():
    points = [Point(w, w, 3 * w**0.7, int(w**2)) for w in (10, 100, 1000)]
    assert exponent(points, "seconds") == pytest.approx(0.7)
    assert exponent(points, "memory") == pytest.approx(2)


def test_a_plot_has_a_line_for_each_axis_and_one_for_linear_growth(tmp_path):
    write_plot(tmp_path / "a.svg", {"batch": [(1, 1.0), (2, 2.0)], "side": [(5, 0.1), (50, 0.7), (500, 8.0)]})
    lines = xml.parse(tmp_path / "a.svg").findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 3


@pytest.fixture
def recipes(tmp_path):
    pixels = torch.arange(3 * 16 * 16).reshape(16, 16, 3).remainder(256).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "0.png")
    levels = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=3,
        **levels,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **levels
    )
    return {kind: kind(unet, vae, [tmp_path / "0.png"], 2) for kind in (Original, Diffusers)}


def test_pictures_are_read_as_they_are(recipes):
    x = recipes[Original].read()
    assert x.shape == (2, 3, 16, 16)
    assert_close(x[0, :, 0, 1], torch.tensor([3.0, 4.0, 5.0]) / 127.5 - 1, check_device=False)


def test_the_noise_of_both_is_that_of_stock_diffusers(recipes):
    stock = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert_close(recipes[Original].alpha.cpu() ** 2, stock.alphas_cumprod, atol=1e-6, rtol=1e-5)
    assert_close(recipes[Diffusers].scheduler.alphas_cumprod, stock.alphas_cumprod)


@pytest.mark.parametrize("kind", [Original, Diffusers])
def test_a_step_trains_the_unet_and_its_average_and_nothing_else(recipes, kind):
    recipe = recipes[kind]
    before = {name: p.clone() for name, p in recipe.unet.named_parameters()}
    frozen = [p.clone() for p in recipe.vae.parameters()]
    for _ in range(3):
        recipe.step()
    averages = list(recipe.update.averages.values())
    for (name, p), average in zip(recipe.unet.named_parameters(), averages, strict=True):
        if name != "class_embedding.weight":
            assert not torch.equal(p, before[name]) and not torch.equal(average, before[name]), name
    assert all(torch.equal(a, b) for a, b in zip(frozen, recipe.vae.parameters(), strict=True))
