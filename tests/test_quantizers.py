import numpy as np
import pytest
import torch
from diffusers import VQModel
from torch import nn
from torch.testing import assert_close
from vector_quantize_pytorch import FSQ, VectorQuantize

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


def vector_quantize(ours):
    """VectorQuantize of vector_quantize_pytorch with our codebook, its vectors never revived.

    It counts choices and not shares of them: what one of ours has seen as 1 it has seen as rows / vectors. Its counts
    are smoothed with eps, so that this must be next to nothing.
    """
    count, dim = ours.embedding.weight.shape
    theirs = VectorQuantize(
        dim, count, decay=ours.decay, eps=1e-9, accept_image_fmap=True, rotation_trick=False, threshold_ema_dead_code=0
    )
    theirs._codebook.embed.copy_(ours.embedding.weight[None])
    share = 8 * 4 * 4 / count
    theirs._codebook.cluster_size.fill_(share)
    theirs._codebook.embed_avg.copy_(share * ours.embedding.weight[None])
    return theirs


def test_lookup_gradient_and_commitment_are_those_of_another_implementation():
    ours = started()
    theirs = vector_quantize(ours)
    h, eps = codes(1)
    with torch.no_grad():
        assert_close(ours.mode(h), theirs.eval()(h)[0])
        assert len(ours.indices(h).unique()) > 8
    weight, gradients = codes(2)[0], []
    for quantizer in (lambda x: ours(x, eps), theirs.train()):
        x = h.clone().requires_grad_()
        z, *numbers, penalty = quantizer(x)
        commitment = penalty if numbers else penalty["commitment"].mean()
        gradients.append(torch.autograd.grad((z * weight).sum() + commitment, x)[0])
    assert_close(commitment, ours(h, eps)[1]["commitment"].mean())
    assert torch.equal(numbers[0], ours.indices(h))
    assert_close(*gradients)


def test_running_means_are_those_of_another_implementation():
    ours = started()
    theirs = vector_quantize(ours).train()
    before = ours.embedding.weight.clone()
    for seed in range(20):
        h, eps = codes(seed)
        ours(h, eps)
        ours.after_step(GOOD)
        theirs(h)
        assert (ours.average.counts > ours.revive_below).all()
        assert_close(ours.embedding.weight, theirs._codebook.embed[0], atol=1e-5, rtol=1e-5)
    assert (ours.embedding.weight - before).abs().max() > 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5])
def test_a_step_that_is_left_out_leaves_the_codebook_as_it_was(value):
    quantizer = started()
    steps(quantizer, 3)
    quantizer.embedding.weight[3] = 1000.0  # and one that is about to be revived
    quantizer.average.restart(quantizer.embedding.weight)
    quantizer.average.counts[3] = 0.02
    before = [tensor.clone() for tensor in (quantizer.embedding.weight, *quantizer.average.buffers())]
    h, eps = codes(50)
    h[2:4] = value
    quantizer(h, eps)
    quantizer.after_step(torch.tensor(False))
    after = (quantizer.embedding.weight, *quantizer.average.buffers())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert quantizer.seen == []
    steps(quantizer, 1)  # which is taken
    assert all(not torch.equal(a, b) and a.isfinite().all() for a, b in zip(after, before, strict=True))


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


LEVELS = [(8, 5, 4), (3, 3), (2, 7), (8, 5, 5, 5)]


def finite_scalars(levels, **more):
    """Our quantiser, and FSQ of vector_quantize_pytorch whose levels are spread evenly over [-1, 1] as ours are."""
    ours = FiniteScalar(nn.Embedding(int(np.prod(levels)), len(levels)), levels)
    return ours, FSQ(list(levels), preserve_symmetry=True, **more)


@pytest.mark.parametrize("levels", LEVELS)
def test_the_grid_is_that_of_another_implementation(levels):
    """The numbers of the codes differ, for their first channel runs fastest and ours slowest."""
    ours, theirs = finite_scalars(levels)
    assert ours.embedding.num_embeddings == theirs.codebook_size
    grid = {tuple(code) for code in ours.embedding.weight.mul(1000).round().tolist()}
    assert grid == {tuple(code) for code in theirs.implicit_codebook.mul(1000).round().tolist()}
    assert len(grid) == theirs.codebook_size


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("hard", [True, False])
def test_codes_and_their_gradient_are_those_of_another_implementation(levels, hard):
    """With its bound as a clamp ours is the same function; the paper's tanh is ours after a tanh."""
    ours, theirs = finite_scalars(levels, bound_hard_clamp=hard)
    h = codes(3, shape=(len(levels), 4, 4), spread=1.2)[0]
    found, other = h.clone().requires_grad_(), h.clone().requires_grad_()
    z, quantised = ours(found if hard else found.tanh(), found)[0], theirs(other)[0]
    assert_close(z, quantised, atol=1e-6, rtol=0)
    weight = codes(4, shape=(len(levels), 4, 4))[0]
    (z * weight).sum().backward(), (quantised * weight).sum().backward()
    assert_close(found.grad, other.grad, atol=1e-5, rtol=1e-5)
    assert (found.grad == 0).any() == hard and (found.grad != 0).float().mean() > 0.4


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


def white(h):
    rows = h.permute(0, 2, 3, 1).reshape(-1, h.shape[1])
    return rows.mean(0), torch.cov(rows.T)


def narrow(seed, n=64):
    """Codes whose channels are narrow, shifted and nearly alike."""
    h = normal(seed, "narrow", 0, n, (2, 4, 4))
    return torch.stack([0.1 * h[:, 0] + 3, 0.1 * h[:, 0] + 0.01 * h[:, 1] - 1], dim=1)


def test_codes_before_a_grid_are_held_white():
    quantizer = FiniteScalar(nn.Embedding(25, 2), (5, 5))
    use = CodeUse(25)
    use.add(quantizer.indices(narrow(0)))
    assert use.figures(use.total)["code_usage"] <= 0.2
    quantizer.start_from(narrow(0))
    for seed in range(800):
        quantizer(3 * narrow(seed) + 5, narrow(seed))  # the encoder has moved since
        quantizer.after_step(GOOD)
    mean, covariance = white(quantizer.whitening(3 * narrow(999, 512) + 5))
    assert_close(mean, torch.zeros(2), atol=0.05, rtol=0)
    assert_close(covariance, torch.eye(2), atol=0.05, rtol=0)
    use.total.zero_()
    use.add(quantizer.indices(3 * narrow(999, 512) + 5))
    assert use.figures(use.total)["code_usage"] == 1.0


def test_whitening_folds_into_the_convolution_before_it():
    quantizer, conv = FiniteScalar(nn.Embedding(25, 2), (5, 5)), nn.Conv2d(3, 2, 1)
    x = torch.randn(8, 3, 4, 4)
    with torch.no_grad():
        quantizer.start_from(conv(x))
        before = quantizer.whitening(conv(x))
        quantizer.whitening.fold_into(conv)
        assert_close(conv(x), before, atol=1e-4, rtol=1e-4)
        assert_close(quantizer.whitening(conv(x)), conv(x))


def test_micro_batches_and_left_out_steps_of_a_grid():
    whole, parts = (FiniteScalar(nn.Embedding(25, 2), (5, 5)) for _ in range(2))
    h = narrow(1)
    whole(h, h), parts(h[:32], h), parts(h[32:], h)
    whole.after_step(GOOD), parts.after_step(GOOD)
    assert_close(parts.whitening.state_dict(), whole.whitening.state_dict(), atol=1e-4, rtol=1e-4)
    before = {name: value.clone() for name, value in whole.whitening.state_dict().items()}
    whole(h * float("nan"), h)
    whole.after_step(~GOOD)
    assert_close(whole.whitening.state_dict(), before, atol=1e-6, rtol=1e-6)
