"""The change of log-density along an ODE dz/ds = f(z, s), for any f.

    d/ds log p_s(z(s)) = - tr(df/dz)        (Chen et al. 2018, eq. 8; Song et al. 2021, eq. 39)

so log p at the beginning of a path is log p at its end plus the integral of the divergence tr(df/dz) between them. The
trace is taken exactly, with one vector-Jacobian product for each of the d numbers, or estimated by K of them
(Hutchinson 1990; FFJORD, Grathwohl et al. 2019). f is asked in the precision that it is given in; what is summed up is
double.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from calotype.errors import UserError
from calotype.pipeline.ode import follow
from calotype.randomness import normal, uniform

Slope = Callable[[Tensor, float], Tensor]  # z (B, ...) and s -> dz/ds (B, ...)


class Trace(Protocol):
    """tr(df/dz), or an estimate of it, from a graph that leads from z to f."""

    def __call__(self, f: Tensor, z: Tensor, evaluation: int) -> Tensor:
        """The trace (B,) at z (B, ...) where f (B, ...) was found; `evaluation` counts how often it was asked for."""


class Exact:
    """The trace itself, for small d: d vector-Jacobian products, one after the other, so memory is that of one."""

    def __call__(self, f: Tensor, z: Tensor, evaluation: int) -> Tensor:
        """The trace (B,)."""
        if not f.requires_grad:  # a slope that does not look at z
            return torch.zeros(len(z), dtype=torch.float64)
        columns, total = f.flatten(1), torch.zeros(len(z), dtype=torch.float64)
        for j in range(columns.shape[1]):
            (row,) = torch.autograd.grad(columns[:, j].sum(), z, retain_graph=True)
            total += row.flatten(1)[:, j].double().cpu()
        return total


class Hutchinson:
    """The mean of v^T (df/dz) v over K probes v of zero mean and unit covariance: right on average, whatever f is.

    Probes follow from (seed, position of the example): those of an example do not depend on what it shares a batch
    with. Without `positions` all examples have the probes of position 0, so that they can be compared one by one.
    `fresh` ones at every evaluation average out along the path; an adaptive solver needs the same all the way, or it
    takes their noise for stiffness. Rademacher probes, +1 and -1, leave the diagonal without any noise at all.
    """

    def __init__(
        self,
        probes: int = 1,
        kind: str = "rademacher",
        seed: int = 0,
        positions: Sequence[int] | None = None,
        fresh: bool = True,
    ):
        self.probes, self.kind, self.seed, self.positions, self.fresh = probes, kind, seed, positions, fresh
        self._kept: dict[int, Tensor] = {}

    def __call__(self, f: Tensor, z: Tensor, evaluation: int) -> Tensor:
        """The estimate (B,)."""
        total = torch.zeros(len(z), dtype=torch.float64)
        if not f.requires_grad:
            return total
        for k in range(self.probes):
            v = self._probe(k, evaluation, z)
            (product,) = torch.autograd.grad(f, z, v, retain_graph=k + 1 < self.probes)
            total += (product * v).flatten(1).double().sum(1).cpu()
        return total / self.probes

    def _probe(self, k: int, evaluation: int, z: Tensor) -> Tensor:
        """Probe k (B, ...) of an evaluation."""
        if self.fresh:
            return self._draw(f"probe {k} of evaluation {evaluation}", z).to(z)
        if k not in self._kept:
            self._kept[k] = self._draw(f"probe {k}", z)
        return self._kept[k].to(z)

    def _draw(self, purpose: str, z: Tensor) -> Tensor:
        positions = [0] if self.positions is None else self.positions
        parts = [self._at(purpose, first, count, tuple(z.shape[1:])) for first, count in _runs(positions)]
        return torch.cat(parts).expand(len(z), *z.shape[1:])

    def _at(self, purpose: str, first: int, count: int, shape: tuple[int, ...]) -> Tensor:
        if self.kind == "normal":
            return normal(self.seed, purpose, first, count, shape)
        return (uniform(self.seed, purpose, first, count, shape) < 0.5).float() * 2 - 1


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Positions as (first, count) of neighbours, in their order."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([position, 1])
    return [(first, count) for first, count in runs]


class Heun(NamedTuple):
    """Equal steps of Heun's method, two evaluations each; an example's result does not depend on its batch."""

    steps: int = 20

    @property
    def fixed(self) -> bool:
        """Whether it asks for slopes at the same times, whatever they are."""
        return True

    def solve(self, field: Slope, state: Tensor, begin: float, end: float) -> Tensor:
        """The state (B, n) at `end`."""
        return follow(field, state, begin, end, self.steps)


class RungeKutta(NamedTuple):
    """Equal steps of the classical method of order four, four evaluations each; independent of the batch too."""

    steps: int = 8

    @property
    def fixed(self) -> bool:
        """Whether it asks for slopes at the same times, whatever they are."""
        return True

    def solve(self, field: Slope, state: Tensor, begin: float, end: float) -> Tensor:
        """The state (B, n) at `end`."""
        h = (end - begin) / self.steps
        for i in range(self.steps):
            s, middle = begin + i * h, begin + (i + 0.5) * h
            first = field(state, s)
            second = field(state + h / 2 * first, middle)
            third = field(state + h / 2 * second, middle)
            fourth = field(state + h * third, begin + (i + 1) * h)
            state = state + h / 6 * (first + 2 * second + 2 * third + fourth)
        return state


class Dopri5(NamedTuple):
    """Adaptive steps of Dormand and Prince's method, from torchdiffeq.

    The steps are those that the worst example of the batch needs, so the tolerances hold for each one, and results
    differ between batches by no more than them.
    """

    rtol: float = 1e-4
    atol: float = 1e-4

    @property
    def fixed(self) -> bool:
        """Whether it asks for slopes at the same times, whatever they are."""
        return False

    def solve(self, field: Slope, state: Tensor, begin: float, end: float) -> Tensor:
        """The state (B, n) at `end`; raises UserError without torchdiffeq, or where steps become too small."""
        odeint = _odeint()
        length, times = end - begin, torch.tensor([0.0, 1.0], dtype=torch.float64)

        def slope(share: Tensor, state: Tensor) -> Tensor:
            return length * field(state, begin + float(share) * length)

        # step_t: otherwise the last step goes past the end, where a network has not been, and is interpolated.
        options = {"norm": _worst, "step_t": times[1:]}
        try:
            return odeint(slope, state, times, rtol=self.rtol, atol=self.atol, method="dopri5", options=options)[-1]
        except AssertionError as error:  # "underflow in dt", "non-finite values in state"
            raise UserError(
                f"--solver dopri5 cannot follow this ODE ({str(error)[:60]}); give --solver heun, or a larger --rtol."
            ) from None


def _odeint() -> Callable:
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise UserError(
            "--solver dopri5 needs the package torchdiffeq; pip install 'calotype[flows]', or give --solver heun."
        ) from None
    return odeint


def _worst(error: Tensor) -> Tensor:
    """The largest root mean square of rows (B, n): torchdiffeq's own norm would let many examples hide one."""
    return error.square().mean(1).sqrt().max()


Solver = Heun | RungeKutta | Dopri5


class Carried(NamedTuple):
    """What came of z: where it is at the end, and by how many nats log p(z) at the beginning exceeds log p there."""

    z: Tensor  # (B, ...) float64 on the CPU
    change: Tensor  # (B,) float64 on the CPU
    evaluations: int  # of the slope


@torch.no_grad()
def carry(slope: Slope, trace: Trace, z: Tensor, begin: float, end: float, solver: Solver) -> Carried:
    """Carry z (B, ...) along dz/ds = slope(z, s) from `begin` to `end`, and integrate the divergence on the way."""
    field = _Field(slope, trace, z)
    size = math.prod(z.shape[1:])
    state = torch.cat([z.double().cpu().flatten(1), torch.zeros(len(z), 1, dtype=torch.float64)], dim=1)
    state = solver.solve(field, state, begin, end)
    return Carried(state[:, :-1].view(z.shape), size * state[:, -1], field.evaluations)


class _Field:
    """The slope of states (B, d + 1): z, and the integral of the divergence for each of its d numbers.

    So both have the same scale, and one tolerance fits both. States are double and on the CPU, which costs nothing
    beside a network; some devices have no doubles.
    """

    def __init__(self, slope: Slope, trace: Trace, like: Tensor):
        self.slope, self.trace, self.like, self.evaluations = slope, trace, like, 0

    def __call__(self, state: Tensor, s: float) -> Tensor:
        z = state[:, :-1].reshape(self.like.shape).to(self.like).requires_grad_()
        with torch.enable_grad():
            f = self.slope(z, s)
            trace = self.trace(f, z, self.evaluations)
        self.evaluations += 1
        f = f.detach().double().cpu().flatten(1)
        return torch.cat([f, trace[:, None] / f.shape[1]], dim=1)
