"""Perceptual losses against scipy's filters and the package lpips; what is fetched, said and refused."""

import os
import pickle
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d, gaussian_filter
from torch.testing import assert_close

from calotype import cli
from calotype.errors import UserError
from calotype.stage1_vae import perceptual
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.perceptual import GradientFeatures

CPU = torch.device("cpu")
SIZES = [(32, 32), (12, 12), (8, 8), (17, 24)]


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def distance(a, b, network=None):
    network = network or GradientFeatures()
    return network.distance(network.features(a), network.features(b))


def settings(**more):
    return VaeSettings(source="", out="", **more)


# Gradient features


def scipy_features(x, scales):
    """The same maps of one channel (H, W), in double precision."""
    maps = []
    for _ in range(scales):
        dx, dy = np.diff(x, axis=1, append=x[:, -1:]), np.diff(x, axis=0, append=x[-1:])
        maps.append((dx, dy, np.sqrt(smooth(dx**2 + dy**2) + 1e-6)))
        x = smooth(x)[::2, ::2]
    return maps


def smooth(x):
    binomial = np.array([1, 4, 6, 4, 1]) / 16
    return convolve1d(convolve1d(x, binomial, axis=0, mode="nearest"), binomial, axis=1, mode="nearest")


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size, scales", zip(SIZES, (3, 2, 1, 2)))
def test_features_are_those_of_scipy_s_filters(channels, size, scales):
    x = pictures(2, channels, *size)
    found = GradientFeatures().features(x)
    assert len(found) == scales
    for c in range(channels):
        for ours, theirs in zip(found, scipy_features(x[1, c].double().numpy(), scales), strict=True):
            for kind in range(3):
                np.testing.assert_allclose(ours[1, kind * channels + c].numpy(), theirs[kind], atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_equal_pictures_are_no_distance_apart_and_each_example_counts_alone(channels, size):
    x, y = pictures(3, channels, *size), pictures(3, channels, *size, seed=1)
    assert torch.equal(distance(x, x), torch.zeros(3))
    assert_close(distance(x, y), distance(y, x))
    assert distance(x, y).min() > 0.05
    assert_close(distance(x, y), torch.stack([distance(x[i : i + 1], y[i : i + 1])[0] for i in range(3)]))


CHANGES = {
    "mirrored": lambda x: x.flip(-1),
    "upside down": lambda x: x.flip(-2),
    "turned": lambda x: x.transpose(2, 3),
    "negative": lambda x: -x,
    "fainter": lambda x: 0.5 * x,
    "other channels": lambda x: x.roll(1, dims=1),
    "moved": lambda x: x.roll(4, dims=3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_can_be_seen_costs_something(name):
    x = pictures(4, 3, 16, 16)
    assert distance(CHANGES[name](x), x).min() > 0.1


def test_blur_costs_more_the_stronger_it_is():
    x = pictures(4, 1, 32, 32)
    costs = torch.stack([distance(blurred(x, sigma), x) for sigma in (0.3, 0.6, 1.0, 2.0, 4.0)])
    assert (costs.diff(dim=0) > 0).all()


def blurred(x, sigma):
    return torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest"))


def test_moved_texture_costs_less_than_blur_though_its_error_is_larger():
    """A mean error would rather have no texture than one that lies a pixel beside."""
    x = blurred(pictures(4, 1, 64, 64), 0.7) * 2
    moved, blur = x.roll(1, dims=3), blurred(x, 1.5)

    def mse(y):
        return (y - x).square().mean((1, 2, 3))

    assert (mse(moved) > 1.2 * mse(blur)).all()
    assert (distance(moved, x) / mse(moved) < 0.8 * distance(blur, x) / mse(blur)).all()
    energy = [GradientFeatures().features(y)[0][:, 2] for y in (x, moved, blur)]
    assert (energy[1] - energy[0]).abs().mean() < 0.6 * (energy[2] - energy[0]).abs().mean()


def test_the_gradient_is_finite_and_reaches_the_reconstruction():
    network, x = GradientFeatures(), pictures(2, 3, 12, 12)
    for x_hat in (torch.zeros(2, 3, 12, 12), x.clone(), pictures(2, 3, 12, 12, seed=1)):  # flat: a root of nearly zero
        x_hat.requires_grad_()
        network.distance(network.features(x_hat), network.features(x)).sum().backward()
        assert x_hat.grad.isfinite().all()
    assert (x_hat.grad != 0).float().mean() > 0.9
    assert not list(network.parameters()) and not x.requires_grad


# LPIPS


@pytest.fixture
def no_network(monkeypatch):
    """Nothing may be fetched."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download was tried"))


@pytest.fixture
def hub(tmp_path, monkeypatch, no_network):
    """An empty folder in which torchvision's weights are looked for."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """lpips.LPIPS with a random backbone; ours from a file of that backbone; what was said on the way."""
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    stock = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    slices = [getattr(stock.net, f"slice{i}") for i in range(1, 6)]
    backbone = {f"features.{name}": p for part in slices for name, p in part.state_dict().items()}
    file = tmp_path_factory.mktemp("weights") / "vgg.pth"
    torch.save(backbone, file)
    return stock, perceptual.Lpips(backbone), file


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_is_that_of_its_package(both, channels):
    stock, ours, _ = both
    x, y = pictures(3, channels, 32, 32), pictures(3, channels, 32, 32, seed=1)
    rgb = [z.expand(-1, 3, -1, -1) for z in (x, y)]
    with torch.no_grad():
        expected = stock(*rgb).flatten()
        found = distance(x, y, ours)
    assert found.shape == (3,) and expected.min() > 1e-3
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_lpips_teaches_the_reconstruction_alone(both):
    ours = both[1]
    x_hat = pictures(1, 1, 32, 32).requires_grad_()
    distance(x_hat, pictures(1, 1, 32, 32, seed=1), ours).sum().backward()
    assert x_hat.grad.abs().max() > 0
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.whole.training


def test_weights_that_are_there_are_loaded_and_nothing_is_fetched(both, hub, monkeypatch, capsys):
    os.link(both[2], hub / "vgg16-397923af.pth")
    monkeypatch.setattr(perceptual, "Lpips", Loaded)  # a second network of VGG's size takes seconds
    network = perceptual.build(settings(perceptual="lpips"), (16, 16), CPU)
    assert_close(network.backbone, torch.load(both[2], weights_only=True))
    (line,) = capsys.readouterr().out.splitlines()
    assert "LPIPS" in line and str(hub / "vgg16-397923af.pth") in line


class Loaded:
    def __init__(self, backbone):
        self.backbone = backbone

    def to(self, device):
        return self


def test_the_name_is_that_under_which_torchvision_keeps_them():
    from torchvision.models import VGG16_Weights

    assert VGG16_Weights.IMAGENET1K_V1.url.endswith("/vgg16-397923af.pth")


def test_missing_weights_are_not_fetched_unasked(hub, tmp_path, capsys):
    pytest.importorskip("lpips")
    out = tmp_path / "vae"
    words = ["--image-size", "16", "--perceptual", "lpips", "--steps", "1", "--out", str(out)]
    assert cli.main(["train-vae", "shapes", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--allow-download" in line and "--perceptual features" in line and str(hub) in line
    assert perceptual.backbone_file(allow_download=True) == hub / "vgg16-397923af.pth"


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("hostile",))


@pytest.mark.parametrize("kind", ["hostile", "damaged", "other"])
def test_a_file_that_is_not_what_it_should_be_is_refused(hub, kind, monkeypatch, tmp_path):
    pytest.importorskip("lpips")
    monkeypatch.chdir(tmp_path)
    file = hub / "vgg16-397923af.pth"
    if kind == "other":
        torch.save({"features.0.bias": torch.zeros(3)}, file)
    else:
        file.write_bytes(pickle.dumps(Hostile()) if kind == "hostile" else b"no weights")
    with pytest.raises(UserError, match="--perceptual lpips needs .*vgg16-397923af.pth.* damaged.*--allow-download"):
        perceptual.build(settings(perceptual="lpips"), (16, 16), CPU)
    assert not (tmp_path / "hostile").exists()


def test_pictures_that_vgg_cannot_halve_four_times_are_refused(both, hub):
    ours = both[1]
    with pytest.raises(RuntimeError):
        ours.features(pictures(1, 3, 16, 15))
    assert len(ours.features(pictures(1, 3, 16, 16))) == 5
    with pytest.raises(UserError, match="--perceptual lpips .* 16 pixels .* 16x15; give --perceptual features"):
        perceptual.build(settings(perceptual="lpips"), (16, 15), CPU)


def test_weights_that_cannot_be_fetched_are_named(hub, monkeypatch):
    pytest.importorskip("lpips")

    def offline(url, *_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match="--perceptual lpips needs .*no route to host.*--perceptual features"):
        perceptual.build(settings(perceptual="lpips", allow_download=True), (16, 16), CPU)


def test_a_missing_package_is_named(monkeypatch, hub):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"--perceptual lpips needs the package lpips; pip install 'calotype\[eval\]'"):
        perceptual.build(settings(perceptual="lpips"), (16, 16), CPU)


def test_one_line_says_which_loss_is_in_force(capsys):
    assert isinstance(perceptual.build(settings(perceptual="features"), (8, 8), CPU), GradientFeatures)
    (line,) = capsys.readouterr().out.splitlines()
    assert "Perceptual loss: gradient features" in line
    assert perceptual.build(settings(), (8, 8), CPU) is None
    assert capsys.readouterr().out == ""
