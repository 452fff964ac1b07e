import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from calotype.errors import UserError
from calotype.metrics import Moments, frechet_distance, kernel_distance, psnr, ssim
from calotype.randomness import normal

NO_TORCHMETRICS = "NOT compared with torchmetrics: it is missing"


def digits():
    """1797 scanned digits (N, 1, 8, 8) in [-1, 1]."""
    data = pytest.importorskip("sklearn.datasets", reason="NOT tried on real pictures: scikit-learn is missing")
    return torch.from_numpy(data.load_digits().images)[:, None] / 8 - 1


def photographs(height=48, width=64):
    """Four crops (4, 3, height, width) in [-1, 1] of two photographs."""
    data = pytest.importorskip("sklearn.datasets", reason="NOT tried on real pictures: scikit-learn is missing")
    images = [torch.from_numpy(data.load_sample_image(name).copy()) for name in ("china.jpg", "flower.jpg")]
    crops = [x[top : top + height, 200 : 200 + width] for x in images for top in (100, 250)]
    return torch.stack(crops).permute(0, 3, 1, 2) / 127.5 - 1


def moments(f, parts=1):
    found = Moments(f.shape[1])
    for part in f.chunk(parts):
        found.add(part)
    return found


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 3, 4, 4)
    assert_close(psnr(x + torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1), x), torch.tensor([20.0, 40.0]))


@pytest.mark.parametrize("damage", [0.02, 0.2, 1.0])
def test_ssim_agrees_with_torchmetrics_where_the_window_fits(damage):
    image = pytest.importorskip("torchmetrics.functional.image", reason=NO_TORCHMETRICS)
    x = photographs()
    x_hat = (x + damage * normal(0, "damage", 0, len(x), x.shape[1:])).clamp(-1, 1)
    _, places = image.structural_similarity_index_measure(
        (x_hat.double() + 1) / 2, (x.double() + 1) / 2, data_range=1.0, reduction="none", return_full_image=True
    )
    assert_close(ssim(x_hat, x).double(), places[..., 5:-5, 5:-5].flatten(1).mean(1), atol=1e-5, rtol=0)


def test_ssim_in_closed_form():
    dark = torch.full((1, 1, 16, 16), -0.75)
    grey = torch.full((1, 1, 16, 16), 0.0)
    expected = (2 * 0.25 * 1.0 + 0.02**2) / (0.25**2 + 1.0**2 + 0.02**2)
    assert ssim(dark, grey).item() == pytest.approx(expected, abs=1e-4)
    x = photographs()
    assert_close(ssim(x, x), torch.ones(4))


@pytest.mark.parametrize("shape, side", [((8, 8), 7), ((6, 40), 5), ((10, 11), 9), ((1, 5), 1)])
def test_a_small_picture_gets_the_largest_odd_window(shape, side):
    x = photographs(*shape).double()
    y = (0.7 * x + 0.1 * normal(0, "damage", 0, 4, x.shape[1:])).double()
    line = np.exp(-0.5 * ((np.arange(side) - side // 2) / 1.5) ** 2)
    window = torch.from_numpy(np.outer(line, line) / line.sum() ** 2)
    values = []
    for top in range(shape[0] - side + 1):
        for left in range(shape[1] - side + 1):
            p, q = (z[:, :, top : top + side, left : left + side] for z in (x, y))
            mp, mq = ((z * window).sum((2, 3), keepdim=True) for z in (p, q))
            vp, vq, c = (((m - a) * (n - b) * window).sum((2, 3)) for m, a, n, b in
                         ((p, mp, p, mp), (q, mq, q, mq), (p, mp, q, mq)))  # fmt: skip
            mp, mq = mp[..., 0, 0], mq[..., 0, 0]
            light = (2 * (mp + 1) * (mq + 1) + 0.0004) / ((mp + 1) ** 2 + (mq + 1) ** 2 + 0.0004)
            values.append(light * (2 * c + 0.0036) / (vp + vq + 0.0036))
    assert_close(ssim(y, x).double(), torch.stack(values).mean((0, 2)), atol=1e-4, rtol=0)


def test_autocast_does_not_round_ssim():
    x = photographs()
    x_hat = 0.9 * x
    with torch.autocast("cpu", torch.bfloat16):
        inside = ssim(x_hat, x)
    assert torch.equal(inside, ssim(x_hat, x))


def test_moments_are_those_of_numpy_in_parts_and_over_processes():
    f = 100 + normal(0, "features", 0, 300, (5,)) @ normal(1, "mixing", 0, 5, (5,))
    rows = f.double().numpy()
    here, there = moments(f[:120], 3), moments(f[120:], 7)
    here.total += there.total
    for found in (here, moments(f, 4)):
        assert found.count == 300
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.cov, np.cov(rows.T), atol=1e-8)


def with_moments(mean, variances, n=4096):
    """Samples (n, d) of exactly this mean and diagonal covariance."""
    f = normal(len(mean), "white", 0, n, (len(mean),)).double()
    f = f - f.mean(0)
    f = f @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(f.T)).T)
    return moments(f * torch.tensor(variances).double().sqrt() + torch.tensor(mean).double())


def test_the_frechet_distance_of_diagonal_gaussians():
    a, b = with_moments([0.0, 1.0, 3.0], [1.0, 4.0, 0.25]), with_moments([2.0, 1.0, 0.0], [9.0, 4.0, 1.0])
    assert frechet_distance(a, b) == pytest.approx((4 + 0 + 9) + (1 - 3) ** 2 + 0 + (0.5 - 1) ** 2, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_with_fewer_samples_than_features():
    """Both covariances are of rank 9 in 64 dimensions; a rotation of everything changes nothing."""
    f, g = normal(0, "f", 0, 10, (64,)).double(), normal(0, "g", 0, 10, (64,)).double()
    turn = torch.linalg.qr(normal(0, "turn", 0, 64, (64,)).double())[0]
    distance = frechet_distance(moments(f), moments(g))
    assert distance > 1
    assert frechet_distance(moments(f @ turn), moments(g @ turn)) == pytest.approx(distance, rel=1e-6)
    assert frechet_distance(moments(f), moments(f)) == pytest.approx(0, abs=1e-6)


class Features(nn.Module):
    num_features = 12

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(12, 64, dtype=torch.float64, generator=generator) / 8

    def forward(self, x):
        return (x.flatten(1) @ self.weight.T).relu()


def test_the_frechet_distance_is_that_of_torchmetrics_on_real_pictures():
    fid = pytest.importorskip("torchmetrics.image.fid", reason=NO_TORCHMETRICS)
    x = digits()
    real, fake, network = x[:900], x[900:] * 0.8, Features()
    metric = fid.FrechetInceptionDistance(network, normalize=True).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    expected = metric.compute().item()
    assert expected > 0.05
    assert frechet_distance(moments(network(real), 5), moments(network(fake))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_the_kernel_distance_is_that_of_torchmetrics_on_real_pictures():
    kid = pytest.importorskip("torchmetrics.image.kid", reason=NO_TORCHMETRICS)
    x = digits()
    real, fake, network = x[:400], x[400:800] * 0.8, Features()
    metric = kid.KernelInceptionDistance(network, subsets=1, subset_size=400, normalize=True).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    expected = metric.compute()[0].item()
    assert expected > 1e-3
    assert kernel_distance(network(real), network(fake)) == pytest.approx(expected, rel=1e-6)


def test_the_kernel_distance_is_that_of_a_double_loop(monkeypatch):
    f, g = normal(0, "f", 0, 13, (3,)), normal(0, "g", 0, 9, (3,)) + 0.5
    p, q = f.double().numpy(), g.double().numpy()

    def mean(a, b, same):
        pairs = [(a[i] @ b[j] / 3 + 1) ** 3 for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum(pairs) / len(pairs)

    expected = mean(p, p, True) + mean(q, q, True) - 2 * mean(p, q, False)
    assert kernel_distance(f, g) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr("calotype.metrics._ROWS", 4)
    assert kernel_distance(f, g) == pytest.approx(expected, rel=1e-9)


def test_the_kernel_distance_is_zero_in_expectation_for_one_distribution():
    draws = normal(0, "one distribution", 0, 400, (2, 20, 4))
    found = np.array([kernel_distance(f, g) for f, g in draws])
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean()) < 4 * error
    diagonal = np.mean([(f.square().mean(1) + 1).pow(3).mean().item() for f, _ in draws])
    assert 2 * (diagonal - 1) / 20 > 20 * error  # the biased estimate would lie that high, so the test would see it
    assert kernel_distance(draws[0, 0], draws[0, 1] + 1) > found.max()


def test_one_picture_has_no_distance():
    one, many = torch.zeros(1, 3), normal(0, "many", 0, 5, (3,))
    with pytest.raises(UserError, match="1 samples.*2 pictures or more"):
        frechet_distance(moments(one), moments(many))
    with pytest.raises(UserError, match="2 pictures or more"):
        kernel_distance(many, one)
