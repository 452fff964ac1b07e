"""Bounds on log p(x), against a linear model whose log p(x) is known, and across the folding of saved latents."""

import json
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

from calotype import bounds, checkpoint, cli
from calotype.data import Pictures
from calotype.images import normalize
from calotype.sheet import read_sheet
from calotype.stage1_vae import models
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.subject import Subject

SCALE = 0.7  # of p(x|z)
W = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [2.0, -0.3], [0.1, 0.8]])  # x = W z + noise
SLANTED = W @ torch.tensor([[1.0, 0.6], [0.0, 1.0]])
SQUARE = torch.tensor([[1.0, 2.0], [2.0, -1.0], [0.5, 0.0], [0.0, -0.5]])  # columns at right angles


def exact(w, x):
    """log p(x) (B,) of x = w z + noise with a standard normal z."""
    return MultivariateNormal(torch.zeros(len(w)), w @ w.T + SCALE**2 * torch.eye(len(w))).log_prob(x)


def true_posterior(w, x):
    """p(z|x) by completing the square."""
    precision = torch.eye(2) + w.T @ w / SCALE**2
    covariance = torch.linalg.inv(precision)
    return MultivariateNormal(x @ w @ covariance / SCALE**2, covariance)


def linear(w, shift=0.0, stretch=1.0):
    """The linear model with the true posterior's mean and marginal deviations, moved and stretched."""

    def posterior(x):
        true = true_posterior(w, x)
        return Normal(true.mean + shift, stretch * true.variance.sqrt())

    def log_likelihood(z, x):
        return Normal(z @ w.T, SCALE).log_prob(x).sum(1)

    return bounds.Model(posterior, Normal(torch.zeros(2), torch.ones(2)), log_likelihood)


def pictures_of(w, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, generator=g) @ w.T + SCALE * torch.randn(count, len(w), generator=g)


def noise(samples, count, seed=1):
    return torch.randn(samples, count, 2, generator=torch.Generator().manual_seed(seed))


def three_errors(samples, dim=0):
    """Three standard errors of the mean over samples."""
    return 3 * samples.std(dim) / math.sqrt(samples.shape[dim])


def test_the_true_posterior_makes_every_weight_the_likelihood():
    x = pictures_of(SQUARE, 16)
    weights = bounds.log_weights(linear(SQUARE), x, noise(5, 16))
    assert weights.shape == (5, 16)
    assert_close(weights, exact(SQUARE, x).expand(5, 16), atol=1e-4, rtol=1e-5)
    assert_close(bounds.elbo(weights), bounds.importance_weighted(weights))


def test_bounds_are_below_the_likelihood_and_in_order():
    x = pictures_of(SLANTED, 2000)
    weights = bounds.log_weights(linear(SLANTED, 0.3, 1.3), x, noise(64, 2000))
    elbo, tighter, whole = bounds.elbo(weights), bounds.importance_weighted(weights), exact(SLANTED, x)
    assert (tighter >= elbo - 1e-4).all()  # Jensen, for each picture
    assert elbo.mean() < tighter.mean() < whole.mean() + three_errors(tighter - whole)
    assert whole.mean() - elbo.mean() > 0.3 > 5 * (whole.mean() - tighter.mean())


def test_the_elbo_misses_the_divergence_from_the_true_posterior():
    x = pictures_of(SLANTED, 8)
    model = linear(SLANTED, 0.3, 1.3)
    weights = bounds.log_weights(model, x, noise(20_000, 8))
    q = model.posterior(x)
    ours = MultivariateNormal(q.mean, torch.diag(q.stddev[0] ** 2))
    missing = kl_divergence(ours, true_posterior(SLANTED, x))
    assert missing.min() > 0.2
    assert ((exact(SLANTED, x) - missing - bounds.elbo(weights)).abs() < three_errors(weights)).all()


def test_many_importance_samples_reach_the_likelihood():
    x = pictures_of(SLANTED, 8)
    model, whole = linear(SLANTED, 0.3, 1.3), exact(SLANTED, x)
    gaps = [
        (whole - bounds.importance_weighted(bounds.log_weights(model, x, noise(k, 8)))).abs().mean()
        for k in (1, 64, 20_000)
    ]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.02


def test_sampled_and_closed_rate_are_that_of_torch():
    g = torch.Generator().manual_seed(2)
    q = Normal(torch.randn(6, 3, 2, 2, generator=g), torch.rand(6, 3, 2, 2, generator=g) + 0.1)
    p = Normal(torch.randn(3, 1, 1, generator=g), torch.rand(3, 1, 1, generator=g) + 0.5)
    known = kl_divergence(q, p).flatten(1).sum(1)
    assert_close(bounds.rate(q, p), known)
    ratios = torch.stack([bounds.log_ratio(q, p, torch.randn(6, 3, 2, 2, generator=g)) for _ in range(5000)])
    assert ((ratios.mean(0) - known).abs() < three_errors(ratios)).all()
    z, eps = q.mean + 0.7 * q.stddev, torch.full((6, 3, 2, 2), 0.7)
    assert_close(bounds.log_ratio(q, p, eps), (q.log_prob(z) - p.log_prob(z)).flatten(1).sum(1))


def test_a_narrow_posterior_keeps_its_density():
    q, p = Normal(torch.full((1, 1), 3.0), torch.full((1, 1), 1e-9)), Normal(torch.zeros(1), torch.ones(1))
    eps = torch.full((1, 1), 1.5)
    expected = Normal(0.0, 1.0).log_prob(torch.tensor(1.5)) - math.log(1e-9) - p.log_prob(torch.tensor([3.0]))
    assert_close(bounds.log_ratio(q, p, eps), expected)


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_folding_leaves_the_bound_where_it_was(pictures, tmp_path, likelihood):
    """The weights of the checkpoint with p(z) = N(0, I), against the saved autoencoder with the prior of its facts."""
    assert cli.main(["data", str(pictures), "--image-size", "16", "--out", str(tmp_path)]) == 0
    words = "--width 8 --latent-dim 2 --steps 6 --batch-size 8 --precision fp32 --validations 1 --beta 1".split()
    words += ["--likelihood", likelihood, "--out", str(tmp_path / "vae")]
    assert cli.main(["train-vae", str(tmp_path / "data.json"), *words]) == 0
    held_out = Pictures(read_sheet(tmp_path / "data.json"), "val")
    x = normalize(torch.stack([held_out[i] for i in range(len(held_out))]))
    eps = torch.randn(6, len(x), 2, 1, 1, generator=torch.Generator().manual_seed(0))
    subject = Subject.open(tmp_path / "vae/vae", "fp32")
    assert min(abs(scale - 1) for scale in subject.facts.prior_std) > 0.01  # else there was nothing to fold
    with torch.no_grad():
        before = bounds.log_weights(raw_model(tmp_path / "vae"), x, eps)
        after = bounds.log_weights(subject.model(), x, eps)
    assert_close(bounds.elbo(after), bounds.elbo(before), atol=1e-3, rtol=0)
    assert_close(bounds.importance_weighted(after), bounds.importance_weighted(before), atol=1e-3, rtol=0)
    values = x[0].numel() * math.log(2)
    found = json.loads((tmp_path / "vae/finished.json").read_text())
    assert -bounds.elbo(after).mean() / values == pytest.approx(found["bits_per_dim[val]"], rel=0.02)


def raw_model(folder):
    """The model of a stage's last checkpoint, in the coordinates in which it was trained."""
    settings = VaeSettings(**json.loads((folder / "config.json").read_text()))
    parts, _ = checkpoint.load(folder / "checkpoints")
    model = models.build(settings, 3, (16, 16)).eval()
    model.vae.load_state_dict(parts["vae"])
    model.likelihood.load_state_dict(parts["likelihood"])

    def posterior(x):
        mean, logvar = model.encode(x).chunk(2, dim=1)
        return Normal(mean, (0.5 * logvar).exp())

    def log_likelihood(z, x):
        return -model.likelihood(model.decode(z, (16, 16)).clamp(-1, 1), x, model.likelihood.log_scale)

    return bounds.Model(posterior, Normal(torch.zeros(2, 1, 1), torch.ones(2, 1, 1)), log_likelihood)
