"""Codes as pictures, in the tab Reconstruct."""

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image
from studios import furthest, of_each_kind, photograph

from calotype.demo import codes
from calotype.demo import reconstruct as reconstruction
from calotype.stage1_vae.tokens import token_numbers


@pytest.fixture(scope="module")
def models():
    return of_each_kind()


def test_the_error_map_is_black_for_none_and_white_for_much():
    a = Image.new("RGB", (3, 1), (100, 100, 100))
    b = a.copy()
    b.putpixel((1, 0), (100 + codes.ERROR_RANGE,) * 3)
    b.putpixel((2, 0), (100 + 3 * codes.ERROR_RANGE // 2, 100, 100))
    none, much, some = (codes.error_map(a, b).getpixel((i, 0)) for i in range(3))
    assert max(none) < 30 and min(much) > 240 and 30 < max(some) < 250


def test_tiles_of_a_code_are_blue_below_zero_and_brown_above():
    z = torch.tensor([-9.0, -3, 0, 3]).reshape(4, 1, 1).expand(4, 8, 8)
    tiles = codes.code_tiles(z)
    assert tiles.size == (17, 17) and tiles.getpixel((8, 8))[3] == 0
    low, lower, zero, high = (tiles.getpixel(at)[:3] for at in ((2, 2), (12, 2), (2, 12), (12, 12)))
    assert low == lower and low[2] > low[0] and high[0] > high[2] and min(zero) > 230
    assert codes.code_tiles(torch.zeros(5, 1, 1)).size == (5, 1)


def test_the_token_map_has_a_colour_a_token(models):
    studio = models["vq"]
    z = studio.encode(photograph())
    found, count = codes.token_map(studio.pipe.vae, z)
    x = torch.from_numpy(np.asarray(photograph(), np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        numbers = token_numbers(studio.pipe.vae, x)[0].numpy()
    colours = np.asarray(found).astype(int) @ [1, 256, 65536]
    assert count == len(np.unique(numbers)) == len(np.unique(colours))
    assert all(len(np.unique(colours[numbers == number])) == 1 for number in np.unique(numbers))
    result = reconstruction.reconstruct(studio, photograph())
    assert "64 tokens" in result.note and result.code.size == (8, 8)
    assert reconstruction.code_title(studio.pipe) == "Its tokens"
    assert furthest(result.pair[1], studio.pipe.reconstruct([photograph()])[0]) <= 1


def test_a_codebook_of_one_dimension_has_colours_too():
    torch.manual_seed(0)
    vae = VQModel(latent_channels=1, vq_embed_dim=1, num_vq_embeddings=9, sample_size=8)
    found, count = codes.token_map(vae, torch.randn(1, 4, 4))
    assert found.size == (4, 4) and 1 <= count <= 9
