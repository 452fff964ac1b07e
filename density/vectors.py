"""The networks of flows of flat vectors: RealNVP, neural splines and FFJORD, out of zuko's layers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

EXACT_TRACE = 64  # dimensions up to which the trace of a continuous flow is computed and not estimated
_TRAINING_TOLERANCE, _TOLERANCE = 1e-4, 1e-8  # of the solver of a continuous flow
_BINS = 8  # of a spline


class Vectors(nn.Module):
    """A transform of zuko, of latents as flat vectors.

    Splines and integrals lose four digits in single precision, so that once trained these run in double, where the
    device has it.
    """

    def __init__(self, transform: nn.Module, kind: str):
        super().__init__()
        self.transform, self.kind = transform, kind

    def initialize(self, z: Tensor, context: Tensor | None) -> None:
        """Nothing: its layers begin as the identity."""

    def forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """eps (B, c, h, w) and the log-determinant (B,)."""
        eps, ladj = self._precisely("call_and_ladj", z, context)
        return eps.view_as(z).float(), ladj.float()

    def inverse(self, eps: Tensor, context: Tensor | None) -> Tensor:
        """z (B, c, h, w)."""
        return self._precisely("inv", eps, context).view_as(eps).float()

    def _precisely(self, name: str, z: Tensor, context: Tensor | None) -> Any:
        """What this method of the transform gives for flat z."""
        z = z.flatten(1)
        method = _Method(self.transform)
        if self.training or self.kind == "realnvp" or precise(z) is z:
            return method(name, z, context)
        if self.kind == "ffjord":  # its slope is asked again when gradients flow back, and sees to itself
            return method(name, z.double(), context)
        tensors = [*method.named_parameters(), *method.named_buffers()]
        doubled = {key: value.double() for key, value in tensors if value.is_floating_point()}
        return functional_call(method, doubled, (name, z.double(), None if context is None else context.double()))


def precise(z: Tensor) -> Tensor:
    """The same numbers in double precision, where the device has it."""
    return z if z.device.type == "mps" else z.double()


class _Method(nn.Module):
    """A method of a lazy transform as a module, so that all of it runs with the weights that are handed in."""

    def __init__(self, transform: nn.Module):
        super().__init__()
        self.transform = transform

    def forward(self, name: str, z: Tensor, context: Tensor | None) -> Any:
        """What the method gives for z (B, d)."""
        return getattr(self.transform(context), name)(z)


class Continuous(Vectors):
    """FFJORD: the network is the slope of an ODE, and the log-determinant the integral of its trace.

    The trace is Hutchinson's estimate while it trains and for many dimensions, with numbers from torch's generator:
    `probes_from` makes them a function of a key. Otherwise it is exact (Grathwohl et al. 2019, eq. 7 and 8).
    """

    def forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """eps (B, c, h, w) and the log-determinant (B,)."""
        exact = not self.training and z[0].numel() <= EXACT_TRACE
        for part in self.transform.transforms:
            part.exact = exact
            part.atol = part.rtol = _TRAINING_TOLERANCE if self.training else _TOLERANCE
        with nullcontext() if exact or self.training else probes_from(0):
            return super().forward(z, context)


@contextmanager
def probes_from(number: int) -> Iterator[None]:
    """A context in which Hutchinson's probes follow from a key, and no other generator is touched."""
    with torch.random.fork_rng():
        torch.manual_seed(number)
        yield


def network(kind: str, shape: tuple[int, int, int], context: int, width: int, depth: int) -> nn.Module:
    """The fresh network of a flow of examples (B, *shape), told a context (B, context) where that is not 0."""
    if kind == "glow":
        from calotype.density.glow import Glow

        return Glow(shape, context, width, depth)
    from zuko.lazy import LazyComposedTransform

    layers = _LAYERS[kind](math.prod(shape), context, width, depth)
    return (Continuous if kind == "ffjord" else Vectors)(LazyComposedTransform(*layers), kind)


def _realnvp(d: int, context: int, width: int, depth: int) -> list[nn.Module]:
    """Affine couplings of random halves (Dinh et al. 2017)."""
    return [_coupling(d, context, width, i) for i in range(depth)]


def _nsf(d: int, context: int, width: int, depth: int) -> list[nn.Module]:
    """Couplings by rational-quadratic splines with linear layers between (Durkan et al. 2019)."""
    from zuko.transforms import MonotonicRQSTransform

    from calotype.density.glow import Linear

    splines = {"univariate": MonotonicRQSTransform, "shapes": [(_BINS,), (_BINS,), (_BINS - 1,)]}
    return [layer for i in range(depth) for layer in (Linear(d, 1), _coupling(d, context, width, i, **splines))]


def _ffjord(d: int, context: int, width: int, depth: int) -> list[nn.Module]:
    """Free-form continuous flows (Grathwohl et al. 2019)."""
    from zuko.flows.continuous import FFJTransform
    from zuko.utils import broadcast

    class Slope(FFJTransform):
        def f(self, t: Tensor, x: Tensor, c: Tensor | None = None) -> Tensor:
            """dx/dt in the precision of x, whatever that of the weights."""
            weights = {name: value.to(x.dtype) for name, value in self.ode.named_parameters()}
            t = self.freqs.to(x.dtype) * t[..., None]
            told = [t.cos(), t.sin(), x] if c is None else [t.cos(), t.sin(), x, c.to(x.dtype)]
            return functional_call(self.ode, weights, (torch.cat(broadcast(*told, ignore=1), dim=-1),))

    return [_begun_small(Slope(d, context, hidden_features=(width, width)), "ode") for _ in range(depth)]


_LAYERS: dict[str, Callable[[int, int, int, int], list[nn.Module]]] = {
    "realnvp": _realnvp,
    "nsf": _nsf,
    "ffjord": _ffjord,
}


def _coupling(d: int, context: int, width: int, i: int, **univariate) -> nn.Module:
    from zuko.flows.coupling import GeneralCouplingTransform

    mask = torch.randperm(d) % 2 == i % 2 if d > 2 else torch.arange(d) % 2 == i % 2
    hidden = {"hidden_features": (width, width), "activation": nn.SiLU}
    return _begun_small(GeneralCouplingTransform(d, context, mask=mask, **univariate, **hidden), "hyper")


def _begun_small(layer: nn.Module, part: str) -> nn.Module:
    """Let a layer begin near the identity."""
    with torch.no_grad():
        last = getattr(layer, part)[-1]
        last.weight.mul_(0.01)
        last.bias.zero_()
    return layer
