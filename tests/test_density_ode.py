"""Log-density along an ODE: against Gaussians whose score is known, linear fields, autograd's Jacobian and zuko."""

import math

import pytest
import torch
from models import pipeline, tiny_unet
from test_editing import NAMES
from test_latent_space import TRAINED
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal
from torch.testing import assert_close

from calotype.density import diffusion
from calotype.density.ode import Dopri5, Exact, Heun, Hutchinson, RungeKutta, carry
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.ode import Flow, path_of
from calotype.pipeline.samplers import make_scheduler
from calotype.randomness import normal

SOLVERS = {"heun": Heun(100), "runge-kutta": RungeKutta(24), "dopri5": Dopri5(1e-6, 1e-6)}
D = 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian():
    """Correlated, of deviations from 0.4 to 1.4; about centred, as latents are, for a chain that ends near N(0, I)."""
    turn, _ = torch.linalg.qr(random(D, D))
    covariance = turn @ torch.diag(torch.linspace(0.4, 1.4, D, dtype=torch.float64) ** 2) @ turn.T
    return MultivariateNormal(torch.linspace(-0.1, 0.1, D, dtype=torch.float64), covariance)


def exact_network(name, data, alpha, sigma, z):
    """What the best network says of z = alpha x + sigma eps (B, D), where x is of this Gaussian."""
    variance = alpha**2 * data.covariance_matrix + sigma**2 * torch.eye(D, dtype=torch.float64)
    inner = torch.linalg.solve(variance, (z - alpha * data.mean).T).T
    x = data.mean + alpha * inner @ data.covariance_matrix
    eps = sigma * inner
    return {"x0": x, "epsilon": eps, "flow": eps - x}.get(name.split(",")[0], alpha * eps - sigma * x)


def gaussian_slope(name, data):
    path = path_of(make_scheduler(TRAINED[name], "unipc").config | TRAINED[name])

    def slope(z, s):
        angle = None if isinstance(path, Flow) else path._angle(s)
        alpha, sigma = (1 - s, s) if angle is None else (math.cos(angle), math.sin(angle))
        return path.slope(z, exact_network(name, data, alpha, sigma, z), s)

    return diffusion.early(slope)


def log_prob(carried):
    return Independent(Normal(torch.zeros_like(carried.z), 1.0), 1).log_prob(carried.z) + carried.change


def within_three_errors(found, truth):
    """Whether means over the first dimension are within three standard errors of the truth, and that says something."""
    error = found.std(0) / math.sqrt(len(found))
    return ((found.mean(0) - truth).abs() < 3 * error + 1e-9).double().mean()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["flow", "v", "epsilon"])
def test_a_gaussian_with_the_exact_score_has_its_density(name, solver):
    data = gaussian()
    z = data.mean + random(64, D, seed=1) @ torch.linalg.cholesky(data.covariance_matrix).T
    found = log_prob(carry(gaussian_slope(name, data), Exact(), z, 0.0, 1.0, SOLVERS[solver]))
    truth = data.log_prob(z)
    assert truth.std() > 1  # 1 % of the mean would forgive much to the single ones
    assert (found - truth).abs().max() < 0.01 * truth.abs().mean()


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("name", ["flow", "v"])
def test_hutchinson_has_the_gaussians_density_on_average(name, kind):
    data = gaussian()
    z = data.mean + random(3, D, seed=1)
    slope, many = gaussian_slope(name, data), z.repeat_interleave(400, 0)
    trace = Hutchinson(2, kind, positions=range(len(many)))
    found = log_prob(carry(slope, trace, many, 0.0, 1.0, RungeKutta(16))).view(3, 400)
    exact = log_prob(carry(slope, Exact(), z, 0.0, 1.0, RungeKutta(16)))
    assert (exact - data.log_prob(z)).abs().max() < 0.01 * data.log_prob(z).abs().mean()
    assert found.std(1).min() > 0.01
    assert within_three_errors(found.T, exact) == 1


def field(seed=0, size=D):
    """The slope of a small network, as FFJORD's are: it is told z and s."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(size + 1, 16), nn.Tanh(), nn.Linear(16, size)).double().requires_grad_(False)
    return lambda z, s: net(torch.cat([z, torch.full_like(z[:, :1], s)], dim=1))


def trace_of(slope, z, s):
    """By autograd's whole Jacobian."""
    return torch.stack([torch.autograd.functional.jacobian(lambda x: slope(x[None], s)[0], row).trace() for row in z])


def estimate(slope, z, trace):
    z = z.clone().requires_grad_()
    return trace(slope(z, 0.4), z, 0)


def test_the_exact_trace_is_that_of_the_jacobian():
    slope, z = field(), random(4, D)
    assert_close(estimate(slope, z, Exact()), trace_of(slope, z, 0.4))


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_hutchinsons_mean_is_the_trace_and_probes_make_it_steadier(kind):
    slope, z = field(), random(4, D)
    many = z.repeat_interleave(2000, 0)
    one, four = (estimate(slope, many, Hutchinson(k, kind, positions=range(8000))).view(4, 2000).T for k in (1, 4))
    truth = trace_of(slope, z, 0.4)
    assert within_three_errors(one, truth) == 1 and within_three_errors(four, truth) == 1
    assert_close(four.std(0), one.std(0) / 2, rtol=0.15, atol=0)


def test_the_change_along_a_network_is_the_determinant_of_its_map():
    """By autograd's Jacobian of the whole map from beginning to end, back and forth."""
    slope, z = field(), random(3, D)

    def there(row):
        with torch.enable_grad():
            return RungeKutta(12).solve(slope, row[None], 0.0, 1.0)[0]

    jacobians = torch.stack([torch.autograd.functional.jacobian(there, row) for row in z])
    found = carry(slope, Exact(), z, 0.0, 1.0, RungeKutta(12))
    assert_close(found.change, torch.linalg.slogdet(jacobians).logabsdet, rtol=1e-4, atol=1e-5)
    for solver in (RungeKutta(12), Dopri5(1e-7, 1e-7)):
        back = carry(slope, Exact(), found.z, 1.0, 0.0, solver)
        assert_close(back.z, z, rtol=1e-4, atol=1e-5)
        assert_close(back.change, -found.change, rtol=1e-4, atol=1e-5)


def test_zukos_continuous_flow_has_the_density_that_is_found_here():
    cnf = pytest.importorskip("zuko").flows.CNF(3, hidden_features=(16,))
    with torch.no_grad():  # fresh, it hardly moves anything
        for part in cnf.parameters():
            part.copy_(normal(7, str(tuple(part.shape)), 0, 1, tuple(part.shape))[0] * 0.5)
    cnf, z = cnf.double().requires_grad_(False), random(6, 3)
    cnf.transform.atol = cnf.transform.rtol = 1e-9
    map_of = cnf.transform(None)

    def slope(z, s):
        return map_of.f(torch.as_tensor(s, dtype=z.dtype), z)

    found = carry(slope, Exact(), z, 0.0, 1.0, Dopri5(1e-8, 1e-8))
    assert (found.z - z).abs().max() > 0.05
    truth = cnf().log_prob(z)
    assert_close(log_prob(found), truth, rtol=1e-4, atol=1e-4)
    many = z.repeat_interleave(300, 0)
    steady = Hutchinson(positions=range(len(many)), fresh=False)
    noisy = log_prob(carry(slope, steady, many, 0.0, 1.0, Dopri5(1e-6, 1e-6))).view(6, 300)
    assert within_three_errors(noisy.T, truth) == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_linear_field_stretches_by_its_trace(solver):
    matrix = torch.diag(torch.tensor([0.5, -1.0, 0.25])) + 0.2
    z = random(2, 3).float()
    found = carry(lambda z, s: z @ matrix.T, Exact(), z, 0.5, 2.0, SOLVERS[solver])
    assert_close(found.change, torch.full((2,), 1.5 * matrix.trace().item(), dtype=torch.float64), rtol=1e-5, atol=0)
    expected = z.double() @ torch.linalg.matrix_exp(1.5 * matrix.double()).T
    assert_close(found.z, expected, rtol=1e-3, atol=1e-4)
    still = carry(lambda z, s: torch.ones_like(z), Hutchinson(), z, 0.0, 1.0, SOLVERS[solver])
    assert_close(still.z, z.double() + 1) and not still.change.any()


def test_an_adaptive_solver_stays_within_its_times():
    asked = []

    def slope(z, s):
        asked.append(s)
        return -z * s

    carry(slope, Exact(), random(2, 3), 0.25, 1.0, Dopri5(1e-5, 1e-5))
    assert min(asked) == 0.25 and max(asked) == pytest.approx(1.0, abs=1e-12)
    assert max(asked) <= 1.0


def test_one_example_among_many_keeps_its_tolerance():
    """A fast one among slow ones: torchdiffeq's own norm would be the mean over all of them."""
    z = torch.zeros(500, 2, dtype=torch.float64)
    z[7] = 1.0

    def slope(z, s):
        return z * 30 * math.cos(20 * s)

    truth = torch.exp(torch.tensor(30 / 20 * math.sin(20)))
    among = carry(slope, Exact(), z, 0.0, 1.0, Dopri5(1e-5, 1e-5))
    assert_close(among.z[7], truth.double().expand(2), rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def models():
    """The same random network as a flow and as a chain; it is told one of three classes."""
    flow = pipeline(tiny_unet(classes=3), id2label=NAMES)
    chain = LatentDiffusionPipeline(flow.vae, flow.unet, make_scheduler(TRAINED["v"], "ddim"), id2label=NAMES)
    return {"flow": flow, "chain": chain}


@pytest.mark.parametrize("name", ["flow", "chain"])
def test_latents_have_the_density_of_the_map_to_their_noise(models, name):
    """Of a small network that is asked in float32: against autograd's Jacobian of the whole map."""
    pipe, z = models[name], random(2, 4, 2, 2).float()
    solver = RungeKutta(5)
    found = diffusion.density_of(pipe, z, "red", diffusion.Way(solver, probes=0))
    slope = diffusion.early(diffusion.slope_of(pipe, "red", 1))

    def noise(row):
        with torch.enable_grad():
            return solver.solve(slope, row.view(1, 4, 2, 2), 0.0, 1.0).flatten()

    jacobians = torch.stack([torch.autograd.functional.jacobian(noise, row.flatten()) for row in z]).double()
    eps = torch.stack([noise(row).detach() for row in z])
    assert_close(found.eps.flatten(1), eps.double(), rtol=1e-4, atol=1e-4)
    change = torch.linalg.slogdet(jacobians).logabsdet
    assert change.abs().min() > 0.05
    # Of the map of a few steps, which the integral of the trace is but up to their error.
    assert_close(found.log_prob, Normal(0.0, 1.0).log_prob(eps.double()).sum(1) + change, rtol=0, atol=0.01)


def test_a_picture_has_its_density_whatever_it_comes_with(models):
    pipe, z = models["flow"], random(5, 4, 4, 4).float()
    labels = ["red", None, "blue", "red", {"red": 1, "blue": 1}]
    way = diffusion.Way(RungeKutta(2), probes=2)
    whole = diffusion.log_prob(pipe, z, labels, way, range(5))
    small = diffusion.log_prob(pipe, z, labels, way._replace(batch_size=2), range(5))
    assert_close(small, whole, rtol=1e-5, atol=1e-4)
    alone = diffusion.log_prob(pipe, z[3:4], ["red"], way, [3])
    assert_close(alone, whole[3:4], rtol=1e-5, atol=1e-4)
    other = diffusion.log_prob(pipe, z[3:4], ["red"], way, [4])
    assert (other - alone).abs() > 1e-3  # another probe
    shared = diffusion.log_prob(pipe, z.flip(0), labels[::-1], way)
    assert_close(diffusion.log_prob(pipe, z, labels, way), shared.flip(0), rtol=1e-5, atol=1e-4)
    assert (diffusion.log_prob(pipe, z, None, way, range(5)) - whole)[[0, 2]].abs().min() > 1e-3


def test_an_adaptive_solver_finds_the_same_with_others_within_its_tolerance():
    slope, z = field(), random(40, D) * torch.linspace(0.1, 3, 40, dtype=torch.float64)[:, None]
    found = carry(slope, Exact(), z, 0.0, 3.0, Dopri5(1e-5, 1e-5))
    alone = [carry(slope, Exact(), z[i : i + 1], 0.0, 3.0, Dopri5(1e-5, 1e-5)) for i in (0, 39)]
    assert alone[0].evaluations != alone[1].evaluations
    assert_close(found.change[[0, 39]], torch.cat([one.change for one in alone]), rtol=0, atol=D * 1e-4)
    assert found.change.abs().max() > 0.2


def test_the_noise_in_what_a_density_is_of(models):
    assert diffusion.least_noise(models["flow"]) == 0
    assert diffusion.least_noise(models["chain"]) == pytest.approx(0.00085**0.5, rel=1e-4)


def test_torchdiffeq_is_asked_for_by_name(monkeypatch):
    from calotype.errors import UserError

    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)
    with pytest.raises(UserError, match=r"needs the package torchdiffeq; pip install 'calotype\[flows\]'"):
        carry(lambda z, s: z, Exact(), random(1, 2), 0.0, 1.0, Dopri5())
