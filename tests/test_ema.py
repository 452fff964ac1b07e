import copy

import numpy as np
import torch
from torch import nn

from calotype.ema import PowerEma, gamma_of_width


def test_average_equals_the_closed_form_of_the_power_profile():
    model = nn.Linear(3, 1, bias=False)
    ema = PowerEma(model, width=0.1)
    history = []
    for step in range(1, 201):
        with torch.no_grad():
            model.weight.fill_(float(np.sin(step)))
        history.append(model.weight[0, 0].item())
        ema.update(model, step)
    gamma = gamma_of_width(0.1)
    t = np.arange(201, dtype=np.float64)
    weights = np.diff(t ** (gamma + 1)) / 200 ** (gamma + 1)  # integral of the profile over each step
    product = np.zeros(200)
    for i in range(200):
        product *= (1 - 1 / (i + 1)) ** (gamma + 1)
        product[i] = 1 - (1 - 1 / (i + 1)) ** (gamma + 1)
    assert np.allclose(weights, product, atol=1e-12)
    assert abs(ema.model.weight[0, 0].item() - float(np.dot(weights, history))) < 1e-5


def test_late_in_a_run_every_fourth_step_stands_for_four():
    """Against the integral of the profile over all steps: weights that move slowly are averaged alike."""
    model, steps = nn.Linear(1, 1, bias=False), 4000
    ema = PowerEma(model, width=0.05)
    slow = np.sin(np.arange(1, steps + 1) / 50)
    changes = 0
    for step, value in enumerate(slow, start=1):
        with torch.no_grad():
            model.weight.fill_(float(value))
        before = ema.model.weight.item()
        ema.update(model, step)
        changes += ema.model.weight.item() != before
    weights = np.diff(np.arange(steps + 1, dtype=np.float64) ** (gamma_of_width(0.05) + 1))
    assert abs(ema.model.weight.item() - np.dot(weights, slow) / weights.sum()) < 0.02 * slow.std()
    assert changes == 1000 + 3000 // 4


def test_width_is_the_relative_deviation_of_the_profile():
    for width in (0.05, 0.1, 0.2):
        gamma = gamma_of_width(width)
        t = np.linspace(0, 1, 2_000_001)
        profile = t**gamma
        profile /= profile.sum()
        mean = (t * profile).sum()
        assert abs(np.sqrt((profile * (t - mean) ** 2).sum()) - width) < 1e-4


def test_first_update_forgets_the_random_start():
    model = nn.Linear(4, 4)
    ema = PowerEma(copy.deepcopy(model), width=0.05)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(model, 1)
    assert torch.equal(ema.model.weight, model.weight)
