"""What follows the gradients, against torch's own clipping."""

import copy

import pytest
import torch
from torch import nn

from calotype import loop
from calotype.device import accelerator


@pytest.mark.parametrize("length", [1e-3, 0.4999999, 0.5, 0.5000001, 0.6, 1e3, float("nan"), float("inf")])
def test_clipping_is_torch_s_to_the_bit_whether_it_multiplies_or_not(length):
    one = accelerator("fp32")
    ours = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    theirs = copy.deepcopy(ours)
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True) for net in (ours, theirs)]
    gradients = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(ours.parameters())
    ]
    whole = torch.cat([g.flatten() for g in gradients]).norm()
    for net in (ours, theirs):
        for p, gradient in zip(net.parameters(), gradients, strict=True):
            p.grad = gradient / whole * length
    before = copy.deepcopy(ours.state_dict())
    norm = loop.update(one, ours, optimizers[0], clip=0.5)
    assert torch.equal(norm.nan_to_num(-1), torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5).nan_to_num(-1))
    optimizers[1].step()
    expected = theirs.state_dict() if norm.isfinite() else before
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
