"""What the benchmarks of drawing and of quality compare with, and how they read a curve."""

from xml.etree import ElementTree

import pytest
import torch
from models import tiny_vae
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.testing import assert_close

from benchmarks.curve_svg import write_svg
from benchmarks.quality import caught_up
from benchmarks.sample_baselines import ddim, draw, plms, stock_scheduler
from benchmarks.samplers import TRAINED, Mixture, first_from

EPSILON = TRAINED["epsilon"]


@pytest.mark.parametrize("t", [20.0, 300.0, 900.0])
def test_the_mixture_s_network_is_the_gradient_of_its_density(t):
    """eps = -sigma grad log p_t(z), with the density of torch.distributions (Song et al. 2021)."""
    model = Mixture.example(EPSILON, d=6)
    alpha, sigma = model.path(t)
    spread = (alpha**2 * model.var + sigma**2).sqrt().double()
    parts = Independent(Normal(alpha * model.mu.double(), spread), 1)
    density = MixtureSameFamily(Categorical(torch.ones(10).double()), parts)
    z = density.sample((32,)).float()
    x = z.double().requires_grad_()
    score = torch.autograd.grad(density.log_prob(x).sum(), x)[0]
    assert_close(model(z, torch.tensor(t)).double(), -sigma * score, atol=2e-4, rtol=1e-3)


def test_ddim_walks_as_latent_diffusion_published_it():
    """Its times are 1, 6, … 996, and its last step ends at the chain's first noise."""
    scheduler = stock_scheduler("DDIM-200", EPSILON)
    assert scheduler.timesteps.tolist() == [t + 1 for t in range(0, 1000, 5)][::-1]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    chain = (1 - betas).cumprod(0)
    z, eps = (torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    for t, before in ((996, 991), (1, 0)):
        x0 = (z - (1 - chain[t]).sqrt() * eps) / chain[t].sqrt()
        expected = chain[before].sqrt() * x0 + (1 - chain[before]).sqrt() * eps
        assert_close(scheduler.step(eps, t, z).prev_sample, expected, atol=1e-5, rtol=1e-5)


def test_plms_asks_once_more_than_it_steps():
    scheduler = stock_scheduler("PLMS-20", EPSILON)
    assert len(scheduler.timesteps) == 21 and type(scheduler) is type(plms(EPSILON))


def test_the_usual_drawing_leads_away_from_no_class():
    """Both halves of guidance are one batch; scale 1 asks the first alone."""
    asked = []

    class Shifted(torch.nn.Module):
        def forward(self, z, t, class_labels):
            asked.append(class_labels.tolist())
            return type("Out", (), {"sample": class_labels.view(-1, 1, 1, 1).float().expand_as(z)})

    vae, z, labels = tiny_vae(), torch.zeros(2, 4, 8, 8), torch.tensor([3, 5, 10, 10])
    for guidance in (2.0, 1.0):
        scheduler = ddim(EPSILON)
        scheduler.set_timesteps(1)
        x = draw(Shifted(), vae, scheduler, z, labels, guidance)
        assert x.shape[0] == 2 and torch.isfinite(x).all()
    assert asked == [[3, 5, 10, 10], [3, 5]]


def test_from_where_on_a_goal_is_reached():
    assert first_from({4: 3.0, 5: 0.9, 6: 1.1, 7: 1.0, 8: 0.9}, 1.0) == 7
    assert first_from({4: 0.5, 5: 0.4}, 1.0) == 4
    assert first_from({4: 3.0, 5: 2.0}, 1.0) == 6


def test_a_curve_is_read_between_its_points():
    curve = [(30.0, 9.0), (60.0, 5.0), (120.0, 2.0)]
    assert caught_up(curve, 4.0)[0] == pytest.approx(80.0)
    assert caught_up(curve, 9.5) == (30.0, "at most: it is there from its first point on")
    seconds, how = caught_up(curve, 1.0)
    assert seconds == 120 and how.startswith("at least")


def test_a_curve_is_drawn_higher_where_its_values_are(tmp_path):
    write_svg(tmp_path / "curve.svg", {"a < b": [(1.0, 2.0), (10.0, 200.0)], "c": []}, "seconds", "distance")
    root = ElementTree.parse(tmp_path / "curve.svg").getroot()
    points = [line.get("points") for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in points[0].split())
    assert x0 < x1 and y0 > y1 and points[1] == ""
    assert "a < b" in {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
