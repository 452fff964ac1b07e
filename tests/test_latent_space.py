"""Walks in latent space, against closed forms and an exact denoiser."""

import math

import numpy as np
import pytest
import torch
from models import pipeline, tiny_unet
from test_editing import DIFFUSION, NAMES, picture
from torch.testing import assert_close

from calotype.pipeline import latent_space
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.ode import follow, path_of
from calotype.pipeline.samplers import make_scheduler

MEAN, DEVIATION = 0.5, 0.3
TRAINED = {
    "flow": {"prediction_type": "flow_prediction"},
    "epsilon": DIFFUSION,
    "v": DIFFUSION | {"prediction_type": "v_prediction"},
    "x0": DIFFUSION | {"prediction_type": "sample"},
    "v, zero SNR": DIFFUSION | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@pytest.fixture(scope="module")
def pipe():
    return pipeline(tiny_unet(classes=3), id2label=NAMES, default_guidance=1.5)


def test_slerp_is_the_rotation_of_the_plane():
    for share in (0, 0.25, 1):
        a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        angle = share * math.pi / 2
        assert_close(
            latent_space.slerp(a, b, share), torch.tensor([[math.cos(angle), math.sin(angle)]]), atol=1e-6, rtol=0
        )
    a, b = torch.randn(2, 3, 4, 8, 8)
    middle = latent_space.slerp(a, b, 0.5)
    assert middle.std() > 0.9 > (a + b).div(2).std()
    assert_close(latent_space.slerp(a, a, 0.3), a)
    assert_close(latent_space.slerp(a, -a, 0.25), a / 2)


def exact(name, z, alpha, sigma):
    """What the best network says of z = alpha x + sigma eps, where x ~ N(MEAN, DEVIATION^2)."""
    variance = alpha**2 * DEVIATION**2 + sigma**2
    x = MEAN + alpha * DEVIATION**2 / variance * (z - alpha * MEAN)
    eps = sigma / variance * (z - alpha * MEAN)
    return {"x0": x, "epsilon": eps, "flow": eps - x}.get(name.split(",")[0], alpha * eps - sigma * x)


@pytest.mark.parametrize("name", TRAINED)
def test_the_ode_carries_a_gaussian_to_noise(name):
    """Its flow is known: (z - alpha mean) / deviation of z at that time stays what it is."""
    path = path_of(make_scheduler(TRAINED[name], "unipc").config | TRAINED[name])
    z = torch.linspace(-1, 2, 31, dtype=torch.float64).view(1, 1, 1, -1)

    def at(s):
        if name == "flow":
            return 1 - s, s
        angle = path._angle(s)
        return math.cos(angle), math.sin(angle)

    def standard(z, s):
        alpha, sigma = at(s)
        return (z - alpha * MEAN) / math.sqrt(alpha**2 * DEVIATION**2 + sigma**2)

    end = 0.999 if name.endswith("SNR") else 1.0
    noise = follow(lambda z, s: path.slope(z, exact(name, z, *at(s)), s), z, 0.0, end, 200)
    assert_close(standard(noise, end), standard(z, 0.0), atol=2e-3, rtol=0)
    back = follow(lambda z, s: path.slope(z, exact(name, z, *at(s)), s), noise, end, 0.0, 200)
    assert_close(back, z, atol=2e-3, rtol=0)
    assert 0 <= path.time(0.0) < path.time(0.5) < path.time(1.0) <= 1000


@pytest.mark.parametrize("name", sorted(TRAINED.keys() - {"epsilon"}))  # untrained, eps makes a stiff equation
def test_a_picture_comes_back_from_its_noise(pipe, name):
    other = LatentDiffusionPipeline(pipe.vae, pipe.unet, make_scheduler(TRAINED[name], "ddim"), id2label=NAMES)
    z = other.encode_images([picture(), picture(1)]).float()
    steps = 200 if name == "x0" else 60
    noise = latent_space.invert(other, [picture(), picture(1)], ["red", {"red": 1, "blue": 2}], steps)
    back = latent_space.develop(other, noise, ["red", {"red": 1, "blue": 2}], steps)
    assert (back - z).square().mean() < 1e-2 * z.square().mean() and (noise - z).abs().mean() > 0.05


def test_interpolation_begins_and_ends_where_it_should(pipe):
    film = latent_space.interpolate(pipe, 3, 8, 5, ("red", "blue"), guidance_scale=2.0)
    ends = pipe("red", seed=3, guidance_scale=2.0).images[0], pipe("blue", seed=8, guidance_scale=2.0).images[0]
    for found, expected in zip((film[0], film[-1]), ends):
        np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), atol=1)
    assert len(film) == 5 and np.abs(np.asarray(film[2], float) - np.asarray(film[0], float)).max() > 1
    a, b = picture(), picture(1)
    film = latent_space.interpolate(pipe, a, b, 3, (None, "red"))
    for found, expected in zip((film[0], film[-1]), pipe.reconstruct([a, b])):
        assert np.abs(np.asarray(found, float) - np.asarray(expected, float)).mean() < 2
    assert len(latent_space.interpolate(pipe, 1, a, 2)) == 2
    with pytest.raises(ValueError, match="n=1 must be a whole number from 2"):
        latent_space.interpolate(pipe, 1, 2, 1)


def test_variations_are_the_same_picture_changed_by_other_seeds(pipe):
    found = latent_space.variations(pipe, picture(), 2, 0.4, "red", seed=9)
    again = pipe("red", 1, image=picture(), strength=0.4, seed=10).images[0]
    np.testing.assert_allclose(np.asarray(found[1], float), np.asarray(again, float), atol=1)
    assert np.asarray(found[0]).tolist() != np.asarray(found[1]).tolist()


def test_arithmetic_adds_the_difference_of_means(pipe):
    plus, minus = [picture(i) for i in range(1, 4)], [picture(i) for i in range(4, 6)]
    z, p, m = (pipe.encode_images(images) for images in ([picture()], plus, minus))
    expected = pipe.decode_latents(z + 0.5 * (p.mean(0) - m.mean(0)), "pil")[0]
    batches = [plus[:1], plus[1:]]
    found = latent_space.arithmetic(pipe, [picture()], batches, [minus], 0.5)[0]
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), atol=1)
    same = latent_space.arithmetic(pipe, [picture()], [plus], [plus])[0]
    np.testing.assert_allclose(np.asarray(same, float), np.asarray(pipe.reconstruct([picture()])[0], float), atol=1)
    with pytest.raises(ValueError, match="at least one picture on each side"):
        latent_space.arithmetic(pipe, [picture()], [], [minus])


def test_traversal_moves_along_one_direction(pipe):
    z = pipe.encode_images([picture()])[0]
    direction = torch.zeros_like(z)
    direction[2] = 1
    film = latent_space.traverse(pipe, z, direction, (-1, 0, 1))
    moved = z.clone()
    moved[2] -= 1
    assert film[0].tobytes() == pipe.decode_latents(moved[None], "pil")[0].tobytes()
    assert film[1].tobytes() == pipe.reconstruct([picture()])[0].tobytes()


def test_a_model_of_given_pictures_has_no_way_to_noise():
    pipe = pipeline(tiny_unet(9), condition="inpaint")
    with pytest.raises(ValueError, match="condition is 'inpaint': without its picture"):
        latent_space.invert(pipe, [picture()])
