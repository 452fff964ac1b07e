"""Samplers by name: the right scheduler for whatever was trained, with networks that are exact."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch.testing import assert_close

from benchmarks.sample_baselines import ddim
from benchmarks.samplers import TRAINED, Mixture, moments, walk
from calotype.metrics import frechet_distance
from calotype.pipeline.samplers import SAMPLERS, make_scheduler

MEAN, STD = 0.5, 0.3
# Steps at which a method of first order is where one of second order is much earlier, on the grids of the names.
ENOUGH = {"ddim": 300, "euler": 300, "dpm++2m": 18, "unipc": 15, "heun": 36}
PAIRS = [(trained, sampler) for trained in TRAINED for sampler in SAMPLERS]


def noise(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("trained, sampler", PAIRS)
def test_every_pair_draws_the_exact_gaussian(trained, sampler):
    model = Mixture(TRAINED[trained], torch.full((1, 1), MEAN), torch.full((1, 1), STD**2))
    x, _ = walk(model, make_scheduler(TRAINED[trained], sampler), ENOUGH[sampler], noise(20_000, 1))
    assert abs(x.mean().item() - MEAN) < 0.02
    assert abs(x.std().item() / STD - 1) < 0.03


@pytest.mark.parametrize("trained, sampler", PAIRS)
def test_more_steps_come_nearer_to_the_exact_mixture(trained, sampler):
    model, z = Mixture.example(TRAINED[trained], d=16), noise(1000, 16)
    goal = moments(walk(model, make_scheduler(TRAINED[trained], "ddim"), 500, z)[0])
    few, enough = (
        moments(walk(model, make_scheduler(TRAINED[trained], sampler), steps, z)[0])
        for steps in (ENOUGH[sampler] // 6, ENOUGH[sampler])
    )
    assert frechet_distance(few, goal) > 2 * frechet_distance(enough, goal)
    best = frechet_distance(goal, model.moments())
    assert abs(frechet_distance(enough, model.moments()) - best) < 0.1 * best


@pytest.mark.parametrize("trained", TRAINED)
def test_fifteen_evaluations_are_as_good_as_a_hundred_steps_of_heun(trained):
    model, z = Mixture.example(TRAINED[trained]), noise(1000, 64)
    true = model.moments()
    x, evaluations = walk(model, make_scheduler(TRAINED[trained], "unipc"), 15, z)
    reference = frechet_distance(moments(walk(model, make_scheduler(TRAINED[trained], "heun"), 100, z)[0]), true)
    assert evaluations == 15
    assert frechet_distance(moments(x), true) < 1.02 * reference


def test_a_few_evaluations_of_a_flow_are_as_near_as_many_of_ddim():
    """As published: 50 or 200 steps of noise prediction, the same mixture and noise."""
    z, usual, flow = noise(1000, 64), TRAINED["epsilon"], TRAINED["flow"]
    for theirs, ours in ((50, 9), (200, 12)):
        found = [
            frechet_distance(moments(walk(model, scheduler, steps, z)[0]), model.moments())
            for model, scheduler, steps in (
                (Mixture.example(usual), ddim(usual), theirs),
                (Mixture.example(flow), make_scheduler(flow, "unipc"), ours),
            )
        ]
        assert found[1] <= found[0]


@pytest.mark.parametrize("trained", [name for name in TRAINED if name != "flow"])
def test_ddim_is_the_stock_ddim_where_its_steps_divide_the_chain(trained):
    model, z = Mixture.example(TRAINED[trained], d=4), noise(50, 4)
    config = TRAINED[trained] | {"timestep_spacing": "trailing", "clip_sample": False}
    stock = DDIMScheduler(**config)
    ours, theirs = walk(model, make_scheduler(config, "ddim"), 20, z), walk(model, stock, 20, z)
    assert_close(ours[0], theirs[0], atol=2e-3, rtol=2e-3)


def test_euler_on_a_flow_is_the_step_of_the_stock_euler():
    scheduler, stock = make_scheduler(TRAINED["flow"], "euler"), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    stock.set_timesteps(sigmas=scheduler.sigmas[:-1].tolist())
    z, v = noise(8, 3), noise(8, 3, seed=1)
    for ours, theirs in zip(scheduler.timesteps, stock.timesteps, strict=True):
        assert_close(scheduler.step(v, ours, z).prev_sample, stock.step(v, theirs, z).prev_sample)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("first", SAMPLERS)
def test_a_name_means_the_same_on_what_another_name_has_saved(trained, first):
    """A saved UniPC config, say, must not turn a flow into noise prediction."""
    config = make_scheduler(TRAINED[trained], first).config
    model = Mixture(TRAINED[trained], torch.full((1, 1), MEAN), torch.full((1, 1), STD**2))
    x, _ = walk(model, make_scheduler(config, "dpm++2m"), 18, noise(5000, 1))
    assert abs(x.std().item() / STD - 1) < 0.04


def test_flow_names_insist_on_a_flow():
    for name in SAMPLERS:
        ours, plain = make_scheduler(TRAINED["flow"], f"flow-{name}"), make_scheduler(TRAINED["flow"], name)
        assert type(ours) is type(plain) and ours.config == plain.config
        with pytest.raises(ValueError, match=f"sampler='flow-{name[:3]}.*not trained by flow matching; give"):
            make_scheduler(TRAINED["v"], f"flow-{name}")
    with pytest.raises(ValueError, match="sampler='dpm' must be one of ddim, dpm"):
        make_scheduler(TRAINED["v"], "dpm")


def test_the_classes_are_those_that_the_names_stand_for():
    classes = {name: type(make_scheduler(TRAINED["v"], name)) for name in ("euler", "dpm++2m", "unipc")}
    assert classes == {
        "euler": EulerDiscreteScheduler,
        "dpm++2m": DPMSolverMultistepScheduler,
        "unipc": UniPCMultistepScheduler,
    }


def test_a_wrong_parametrisation_would_be_seen():
    """What the tests above would miss if they could not fail."""
    model = Mixture(TRAINED["v"], torch.full((1, 1), MEAN), torch.full((1, 1), STD**2))
    x, _ = walk(model, make_scheduler(TRAINED["epsilon"], "dpm++2m"), 18, noise(5000, 1))
    assert not abs(x.std().item() / STD - 1) < 0.04
