"""From scores to promises: conformal p-values and thresholds, typicality, and one score out of many.

All is learnt from held-out normal pictures alone; no anomaly is ever seen. What would be fitted to the same pictures
whose scores it ranks is fitted to nine tenths of them and scored on the last, in turn (cross-conformal: Vovk 2015,
Barber et al. 2021), so that they meet it as new pictures do.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from calotype.errors import UserError

Scores = dict[str, Tensor]  # name -> (N,) float64
TYPICALITY, COMBINATION = "typicality", "combination"
_FOLDS = 10
_TAIL = 0.1  # share of the strangest normal pictures that tell how fast a tail falls
_AT_ONCE = 4_000_000  # numbers of a matrix of distances


# One score: conformal prediction


def p_value(normal: Tensor, scores: Tensor) -> Tensor:
    """(1 + how many normal scores are at least as high) / (n + 1) (B,), for sorted `normal` (n,) and scores (B,).

    For a normal picture, exchangeable with those n, the chance that it is at most a is at most a, whatever the law of
    scores (Vovk et al. 2005).
    """
    below = torch.searchsorted(normal, scores.contiguous())
    return (len(normal) - below + 1).double() / (len(normal) + 1)


def threshold(normal: Tensor, rate: float, name: str = "--false-alarms") -> float:
    """The least score whose p-value is at most `rate`: just above the ceil((n + 1)(1 - rate))-th of n.

    Raises UserError beginning with `name` where n pictures cannot tell so small a rate.
    """
    n = len(normal)
    place = math.ceil((n + 1) * (1 - rate) - 1e-9)
    if place > n:
        need = math.ceil(1 / rate - 1e-9) - 1
        raise UserError(
            f"{name} {rate:g} needs {need:,} held-out normal pictures to calibrate, and there are {n:,}; give a "
            f"higher rate (from {1 / (n + 1):.2g} on), or fit with more pictures or a larger --val."
        )
    above = torch.nextafter(normal[max(place, 1) - 1], torch.tensor(math.inf, dtype=normal.dtype))
    return -math.inf if place < 1 else float(above)


def share_interval(count: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `count` of n were seen (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.975)
    middle = (count + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(count * (n - count) / n + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


# Many statistics: how typical


class Typicality:
    """How untypical statistics are of normal pictures, on both sides: -log of their densities, summed, in nats.

    A density of each statistic by Gaussian kernels: the density of states of Morningstar et al. (2021). A picture that
    is likelier than normal ones ever are is as untypical as one that is less likely (Nalisnick et al. 2019).
    """

    def __init__(self, normal: Scores):
        self.normal = normal
        self.width = {name: _bandwidth(x) for name, x in normal.items()}

    def __call__(self, statistics: Scores) -> Tensor:
        """(B,) of statistics (B,) each."""
        return sum(self._surprise(name, statistics[name]) for name in self.normal)

    def _surprise(self, name: str, x: Tensor) -> Tensor:
        step = max(1, _AT_ONCE // len(self.normal[name]))
        return torch.cat([self._few(name, part) for part in x.split(step)])

    def _few(self, name: str, x: Tensor) -> Tensor:
        normal, width = self.normal[name], self.width[name]
        exponent = -0.5 * ((x[:, None] - normal) / width).square()
        return math.log(len(normal) * width * math.sqrt(2 * math.pi)) - exponent.logsumexp(1)


def _bandwidth(x: Tensor) -> float:
    """Silverman's rule of thumb (1986, eq. 3.31): robust where tails are long; never 0."""
    quartiles = torch.quantile(x, torch.tensor([0.25, 0.75], dtype=x.dtype))
    spreads = [float(x.std()) if len(x) > 1 else 0.0, float(quartiles[1] - quartiles[0]) / 1.34]
    spread = min(s for s in spreads if s > 0) if any(s > 0 for s in spreads) else 0.0
    return max(0.9 * spread * len(x) ** -0.2, 1e-6 * max(1.0, float(x.abs().max())))


# Many scores: one


class Surprise:
    """-log of the share of normal pictures at least as strange: counted, and beyond the counts as the tail falls.

    The tail above the highest tenth is exponential with its mean excess (peaks over a threshold: Pickands 1975), so
    that what is far outside is still told from what is further.
    """

    def __init__(self, normal: Tensor):
        self.normal = normal.sort().values
        tail = max(1, round(_TAIL * len(normal)))
        self.start = self.normal[-tail - 1] if len(normal) > tail else self.normal[0]
        self.share = tail / (len(normal) + 1)
        excess = float((self.normal[-tail:] - self.start).mean())
        self.scale = max(excess, 1e-6 * max(1.0, float(self.normal.abs().max())))

    def __call__(self, scores: Tensor) -> Tensor:
        """(B,) in nats, never falling with the score."""
        beyond = (scores - self.start) / self.scale - math.log(self.share)
        return torch.where(scores > self.start, beyond, -p_value(self.normal, scores).log())


class Combination:
    """One score of several by Fisher's method (1932): the mean of their surprises, in nats.

    The scores depend on each other, so that the mean is no p-value of its own; its place among those of held-out
    normal pictures is.
    """

    def __init__(self, scores: Scores):
        self.surprises = {name: Surprise(x) for name, x in scores.items()}

    def __call__(self, scores: Scores) -> Tensor:
        """(B,) of scores (B,) each."""
        return torch.stack([surprise(scores[name]) for name, surprise in self.surprises.items()]).mean(0)


class Calibration:
    """What held-out normal pictures say: of statistics and scores, both (n,) each, of the same n pictures."""

    def __init__(self, statistics: Scores, scores: Scores):
        self.statistics, self.scores = statistics, scores
        self.typicality = Typicality(statistics)
        typical = {TYPICALITY: out_of_fold(Typicality, statistics)}
        self.combination = Combination(scores | typical)
        together = {f"statistic/{name}": x for name, x in statistics.items()} | scores
        last = {COMBINATION: out_of_fold(_combination_of(list(statistics), list(scores)), together)}
        self.normal = {name: x.sort().values for name, x in (scores | typical | last).items()}

    @property
    def names(self) -> list[str]:
        """The scores, the combination last."""
        return list(self.normal)

    def complete(self, statistics: Scores, scores: Scores) -> Scores:
        """The scores (B,) of pictures with typicality and combination."""
        scores = scores | {TYPICALITY: self.typicality(statistics)}
        return scores | {COMBINATION: self.combination(scores)}

    def p(self, scores: Scores) -> Scores:
        """The conformal p-value (B,) of each score."""
        return {name: p_value(self.normal[name], x) for name, x in scores.items()}

    def tensors(self) -> Scores:
        """All that it is made of, by name."""
        statistics = {f"statistic/{name}": x for name, x in self.statistics.items()}
        return statistics | {f"score/{name}": x for name, x in self.scores.items()}

    @classmethod
    def of(cls, tensors: Scores) -> "Calibration":
        """The one with these tensors."""
        parts = [
            {name.removeprefix(kind): x for name, x in tensors.items() if name.startswith(kind)}
            for kind in ("statistic/", "score/")
        ]
        return cls(*parts)


def out_of_fold(fit: Callable[[Scores], Callable[[Scores], Tensor]], x: Scores) -> Tensor:
    """What a fit to all other pictures gives for each picture of x, (n,) each: fitted so often as there are folds."""
    n = len(next(iter(x.values())))
    fold, found = torch.arange(n) % min(_FOLDS, n), torch.empty(n, dtype=torch.float64)
    for k in fold.unique().tolist():
        rest, here = fold != k, fold == k
        fitted = fit({name: values[rest if n > 1 else here] for name, values in x.items()})
        found[here] = fitted({name: values[here] for name, values in x.items()})
    return found


def _combination_of(statistics: list[str], names: list[str]) -> Callable[[Scores], Callable[[Scores], Tensor]]:
    """A fit of typicality and combination together."""

    def fit(x: Scores) -> Callable[[Scores], Tensor]:
        of = {name: x[f"statistic/{name}"] for name in statistics}
        typicality, typical = Typicality(of), {TYPICALITY: out_of_fold(Typicality, of)}
        combination = Combination({name: x[name] for name in names} | typical)

        def score(new: Scores) -> Tensor:
            typical = typicality({name: new[f"statistic/{name}"] for name in statistics})
            return combination({name: new[name] for name in names} | {TYPICALITY: typical})

        return score

    return fit
