import numpy as np
import pytest
import torch
from diffusers import VQModel
from torch import nn
from torch.testing import assert_close

from calotype.randomness import normal
from calotype.stage1_vae.folding import Statistics, fold
from calotype.stage1_vae.gauges import ActiveUnits, CodeUse
from calotype.stage1_vae.regularizers import FiniteScalar, VectorQuantization

GOOD = torch.tensor(True)


def codes(seed, n=8, shape=(2, 4, 4), spread=1.0):
    return spread * normal(seed, "codes", 0, n, shape), normal(seed, "eps", 0, n, shape)


def steps(quantizer, count, spread=1.0):
    for seed in range(count):
        h, eps = codes(seed, spread=spread)
        quantizer(h.requires_grad_(), eps)
        quantizer.after_step(GOOD)


def started(count=16):
    torch.manual_seed(0)
    quantizer = VectorQuantization(nn.Embedding(count, 2))
    quantizer.start_from(codes(99, 64)[0], torch.Generator().manual_seed(0))
    return quantizer


def test_the_codebook_is_the_running_mean_of_what_chose_it():
    quantizer = started()
    counts = np.ones(16)
    sums = quantizer.embedding.weight.numpy().astype(np.float64).copy()
    for seed in range(30):
        h, eps = codes(seed)
        numbers = quantizer.indices(h).flatten().numpy()
        rows = h.permute(0, 2, 3, 1).reshape(-1, 2).numpy().astype(np.float64)
        quantizer(h, eps)
        quantizer.after_step(GOOD)
        for i in range(16):
            mine = rows[numbers == i]
            counts[i] = 0.98 * counts[i] + 0.02 * len(mine) * 16 / len(rows)
            sums[i] = 0.98 * sums[i] + 0.02 * mine.sum(0) * 16 / len(rows)
    assert (counts > quantizer.revive_below).all()
    np.testing.assert_allclose(quantizer.embedding.weight.numpy(), sums / counts[:, None], atol=1e-5)


def test_micro_batches_make_one_step():
    whole, parts = started(), started()
    h, eps = codes(1)
    whole(h, eps)
    for i in (0, 4):
        parts(h[i : i + 4], eps[i : i + 4])
    whole.after_step(GOOD), parts.after_step(GOOD)
    assert_close(parts.embedding.weight, whole.embedding.weight)


def test_dead_vectors_come_back():
    """All but one vector are thrown far away; within 300 steps nine of ten are used again."""
    quantizer = started(64)
    quantizer.embedding.weight[1:] = 1000.0
    quantizer.average.restart(quantizer.embedding.weight)
    use = CodeUse(64)
    use.add(quantizer.indices(codes(1000, 64)[0]))
    assert use.figures(use.total)["code_usage"] < 0.05
    steps(quantizer, 300)
    use = CodeUse(64)
    use.add(quantizer.indices(codes(1000, 64)[0]))
    assert use.figures(use.total)["code_usage"] >= 0.9


def test_nothing_moves_without_training():
    quantizer = started()
    before = quantizer.embedding.weight.clone()
    h, eps = codes(1)
    with torch.no_grad():
        quantizer(h, eps)
    assert quantizer.seen == [] and torch.equal(quantizer.embedding.weight, before)


def test_starting_centres_are_better_than_picked_ones():
    rows = codes(99, 64)[0]
    quantizer = started()
    error = (quantizer(rows, rows)[0] - rows).square().mean()
    picked = VectorQuantization(nn.Embedding(16, 2))
    picked.start_from(rows, torch.Generator().manual_seed(0), rounds=0)
    assert error < 0.8 * (picked(rows, rows)[0] - rows).square().mean()


TINY = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "latent_channels": 3,
    "vq_embed_dim": 3,
    "num_vq_embeddings": 8 * 5 * 4,
    "mid_block_add_attention": False,
}


@torch.no_grad()
def test_a_stock_vqmodel_reproduces_finite_scalars_before_and_after_folding():
    torch.manual_seed(0)
    vae = VQModel(**TINY).eval()
    quantizer = FiniteScalar(vae.quantize.embedding, (8, 5, 4))
    h = 1.5 * torch.randn(4, 3, 6, 6)
    ours, terms = quantizer(h, h)
    assert_close(ours, vae.quantize(h)[0], atol=1e-6, rtol=0)
    assert terms == {}
    assert [len(ours[:, i].unique()) for i in range(3)] == [8, 5, 4]
    assert torch.equal(quantizer.indices(h).flatten(), vae.quantize(h)[2][2])
    x = torch.rand(2, 1, 8, 8)
    decoded = vae.decode(vae.encode(x).latents).sample
    fold(vae, Statistics(torch.tensor([0.1, -0.2, 0.0]), torch.tensor([0.6, 0.6, 0.6])))
    assert_close(vae.decode(vae.encode(x).latents).sample, decoded, atol=1e-5, rtol=1e-5)


def test_the_gradient_of_finite_scalars_is_that_of_the_clamp():
    quantizer = FiniteScalar(nn.Embedding(25, 2), (5, 5))
    h = torch.tensor([[0.3, -2.0], [1.7, -0.1]]).reshape(2, 2, 1, 1).requires_grad_()
    z, _ = quantizer(h, h)
    z.sum().backward()
    assert h.grad.flatten().tolist() == [1.0, 0.0, 0.0, 1.0]
    assert_close(z.flatten(), torch.tensor([0.5, -1.0, 1.0, 0.0]))


def test_perplexity_and_usage_in_known_cases():
    use = CodeUse(8)
    use.add(torch.arange(4).repeat(5).reshape(1, 4, 5))
    assert use.figures(use.total) == pytest.approx({"code_usage": 0.5, "perplexity": 4.0})


def test_active_units_are_those_that_vary():
    gauge = ActiveUnits((4, 1, 1))
    mean = torch.randn(500, 4, 1, 1) * torch.tensor([1.0, 0.5, 0.05, 0.0]).reshape(4, 1, 1) + 3
    for part in mean.split(100):
        gauge.add(part)
    assert gauge.figures(gauge.total)["active_units"] == 0.5
