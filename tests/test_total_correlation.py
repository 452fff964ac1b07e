"""The critic's estimate against the total correlation of normal codes, which is known; whom its gradients reach."""

import json

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from calotype import cli
from calotype.device import accelerator
from calotype.randomness import normal
from calotype.stage1_vae import models
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.total_correlation import TotalCorrelation, shuffle_columns

R = torch.tensor([[1.0, 0.7, 0.2], [0.7, 1.0, -0.3], [0.2, -0.3, 1.0]])


def settings(**more):
    return VaeSettings(source="", out="", regularizer="tc", width=8, factor=2, latent_channels=3, **more)


def critic(**more):
    return TotalCorrelation(settings(discriminator_lr=2e-3, **more), 3, accelerator("fp32"))


def codes(correlation, position, count):
    """Normal codes (count, 3, 1, 1) with these correlations and means and scales of their own."""
    z = normal(1, "codes", position, count, (3,)) @ torch.linalg.cholesky(correlation).T
    return (z * torch.tensor([1.0, 0.5, 2.0]) + torch.tensor([0.0, 1.0, -1.0]))[..., None, None]


def estimate(correlation, steps=150, batch=512):
    found = critic()
    with torch.no_grad():
        for step in range(steps):
            found.term(codes(correlation, step * batch, batch))
            with torch.enable_grad():
                figures = found.update(step)
        return found.term(codes(correlation, 10**6, 8192)).mean().item(), figures


def test_the_estimate_is_the_total_correlation():
    independent = MultivariateNormal(torch.zeros(3), torch.eye(3))
    joint = MultivariateNormal(torch.zeros(3), R)
    known = -0.5 * torch.logdet(R).item()
    assert known == pytest.approx(torch.distributions.kl_divergence(joint, independent).item(), abs=1e-5)
    found, figures = estimate(R)
    assert found == pytest.approx(known, abs=0.12) and known > 0.4
    assert 0.55 < figures["critic_accuracy"] < 0.8


def test_independent_codes_have_none():
    found, figures = estimate(torch.eye(3))
    assert found == pytest.approx(0.0, abs=0.05)
    assert figures["critic_accuracy"] == pytest.approx(0.5, abs=0.06)


def test_shuffling_keeps_columns_and_breaks_rows():
    z = torch.arange(300.0).reshape(100, 3)
    shuffled = shuffle_columns(z, 0, 7)
    assert torch.equal(shuffled.sort(0).values, z)
    rows = ((shuffled - torch.arange(3.0)) / 3).round()  # the row from which each element came
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (rows[:, i] == rows[:, j]).sum() < 6  # one is expected of 100
    assert all((rows[:, i] == torch.arange(100.0)).sum() < 6 for i in range(3))


def test_an_order_is_a_function_of_seed_and_step():
    z = torch.arange(300.0).reshape(100, 3)
    again, other_seed, other_step = (shuffle_columns(z, *place) for place in ((0, 7), (1, 7), (0, 8)))
    assert torch.equal(shuffle_columns(z, 0, 7), again)
    assert not torch.equal(again, other_seed) and not torch.equal(again, other_step)


def test_two_critics_of_a_seed_are_the_same_and_the_global_generator_is_not_read():
    state = torch.get_rng_state()
    first, second, other = critic(), critic(), critic(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [found.critic[0].weight for found in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_term_reaches_codes_and_never_the_critic():
    found = critic()
    z = codes(R, 0, 16).requires_grad_()
    term = found.term(z)
    assert term.shape == (16,)
    assert_close(term, found.critic(z.flatten(1)).squeeze(1))
    (expected,) = torch.autograd.grad(found.critic(z.flatten(1)).sum(), z)
    term.sum().backward()
    assert_close(z.grad, expected)
    assert z.grad.abs().max() > 0 and all(p.grad is None for p in found.critic.parameters())


def test_the_term_moves_the_encoder_and_the_update_the_critic_alone():
    model, found = models.build(settings(), channels=1, size=(2, 2)), critic()
    x = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    out = model(x, torch.randn(8, 3, 1, 1, generator=torch.Generator().manual_seed(1)))
    found.term(out.z).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    moved = {name.split(".")[1] for name, gradient in gradients.items() if gradient.abs().max() > 0}
    assert moved == {"encoder", "quant_conv"}
    weights = [p.detach().clone() for p in (*model.parameters(), *found.critic.parameters())]
    found.update(0)
    after = [*model.parameters(), *found.critic.parameters()]
    ours = len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(weights[:ours], after[:ours]))
    assert all(not torch.equal(a, b) for a, b in zip(weights[ours:], after[ours:]))
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if name in gradients)
    assert found.seen == []


def test_micro_batches_do_not_change_a_run(pictures, tmp_path):
    assert cli.main(["data", str(pictures), "--image-size", "16", "--out", str(tmp_path)]) == 0
    words = "--regularizer tc --width 8 --latent-dim 3 --steps 5 --batch-size 8 --precision fp32".split()
    words += ["--validations", "1", "--log-every", "1", "--discriminator-lr", "0.001"]
    runs = []
    for parts in ("1", "2"):
        out = tmp_path / parts
        more = ["--micro-batches", parts, "--out", str(out)]
        assert cli.main(["train-vae", str(tmp_path / "data.json"), *words, *more]) == 0
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        runs.append([[line[f"{name}[train]"] for name in ("loss", "tc", "critic")] for line in lines if "lr" in line])
    whole, parts = map(torch.tensor, runs)
    assert whole.shape == (5, 3) and whole[0, 2] != whole[-1, 2]
    assert_close(parts, whole, atol=1e-5, rtol=1e-5)
