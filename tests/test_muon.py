"""Muon against torch's own (which knows no kernels), AdamW for the rest, and a resumed run."""

import copy

import torch
from torch import nn
from torch.testing import assert_close

from calotype import checkpoint
from calotype.muon import Muon, orthogonalized, split

RATE, DECAY = 0.02, 0.1


def descend(model, *optimizers, steps=4):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 5))


def test_matrices_move_as_under_the_muon_of_torch_and_the_rest_as_under_adamw():
    ours, theirs = network(), network()
    descend(ours, Muon(ours, RATE, (0.9, 0.99), DECAY))
    matrices, rest = split(theirs)
    reference = torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    descend(theirs, reference, torch.optim.AdamW(rest, RATE, (0.9, 0.99), weight_decay=DECAY))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a, b)
    assert not torch.equal(ours[0].weight, network()[0].weight)


def test_a_kernel_is_a_matrix_and_tables_and_ends_are_none():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_in, self.hidden, self.conv_out = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 1, 3)
            self.table, self.norm = nn.Embedding(3, 4), nn.GroupNorm(2, 4)

    model = Small()
    matrices, rest = split(model)
    assert [p is model.hidden.weight for p in matrices] == [True]
    assert len(rest) == len(list(model.parameters())) - 1
    before = model.hidden.weight.detach().clone()
    model.hidden.weight.grad = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    Muon(model, RATE, (0.9, 0.99), 0.0).step()
    step = (before - model.hidden.weight.detach()).flatten(1) / RATE
    expected = 0.2 * 36**0.5 * orthogonalized(model.hidden.weight.grad.flatten(1))
    assert_close(step, expected, atol=0.05, rtol=0)  # bf16 rounds the scaled gradient otherwise
    assert expected.abs().max() > 0.5


def test_orthogonalized_keeps_the_directions_and_levels_the_sizes():
    g = torch.Generator().manual_seed(0)
    for shape in ((5, 30), (30, 5)):
        matrix = torch.randn(shape, generator=g)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ orthogonalized(matrix) @ v.T
        assert ((inner.diagonal() > 0.6) & (inner.diagonal() < 1.3)).all()
        assert (inner - inner.diagonal().diag()).abs().max() < 0.05


def test_a_saved_state_goes_on_to_the_same_bits():
    whole, first = network(), network()
    descend(whole, Muon(whole, RATE, (0.9, 0.99), 0.0), steps=6)
    optimizer = Muon(first, RATE, (0.9, 0.99), 0.0)
    descend(first, optimizer, steps=3)
    second = copy.deepcopy(first)
    resumed = Muon(second, RATE, (0.9, 0.99), 0.0)
    checkpoint.load_optimizer(resumed, checkpoint.optimizer_tensors(optimizer))
    descend(second, resumed, steps=3)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
