"""Series of (step, value) turned into the geometry of a small SVG chart; the report's template writes the markup."""

import math
from dataclasses import dataclass

WIDTH, WIDE, HEIGHT = 480, 990, 230
LEFT, TOP, BOTTOM, MARGIN = 54, 12, 204, 12
MOST_POINTS = 300
SMOOTH_FROM = 60  # fewer points than this are drawn as they are
LOG_FROM = 20  # a ratio of largest to smallest from which a linear axis would hide most of the curve

Point = tuple[int, float]


@dataclass(frozen=True)
class Axis:
    """Values between `low` and `high` on a line of pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def pixel(self, value: float) -> float:
        """Where a value lies."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, float]]:
        """The round values on this axis with their pixels."""
        values = _round_decades(self.low, self.high) if self.log else _round_values(self.low, self.high)
        return [(self.pixel(value), value) for value in values if self.low <= value <= self.high]


@dataclass(frozen=True)
class Curve:
    """One line of a chart: `points` are (pixel x, pixel y, step, value), `trend` is the same smoothed."""

    name: str
    points: list[tuple[float, float, int, float]]
    trend: list[tuple[float, float]]

    @property
    def last(self) -> float:
        """The newest value."""
        return self.points[-1][3]


@dataclass(frozen=True)
class Chart:
    """A titled set of curves on two axes."""

    title: str
    x: Axis
    y: Axis
    curves: list[Curve]
    width: int = WIDTH

    @property
    def last_step(self) -> int:
        """The newest step of any curve."""
        return max(curve.points[-1][2] for curve in self.curves)


def draw(title: str, series: dict[str, list[Point]], width: int = WIDTH) -> Chart:
    """A chart of one or more series; each is a non-empty list of (step, value) in the order of steps."""
    thinned = {name: thin(points) for name, points in series.items()}
    steps = [step for points in thinned.values() for step, _ in points]
    values = [value for points in thinned.values() for _, value in points]
    x = Axis(min(steps), max(steps), LEFT, width - MARGIN)
    y = _value_axis(min(values), max(values))
    return Chart(title, x, y, [_curve(name, points, x, y) for name, points in thinned.items()], width)


def thin(points: list[Point]) -> list[Point]:
    """At most MOST_POINTS points, both ends among them; a point between stands for the mean of its stretch."""
    if len(points) <= MOST_POINTS:
        return points
    inner, count = points[1:-1], MOST_POINTS - 2
    cuts = [i * len(inner) // count for i in range(count + 1)]
    stretches = [inner[start:end] for start, end in zip(cuts, cuts[1:])]
    means = [(part[len(part) // 2][0], sum(value for _, value in part) / len(part)) for part in stretches]
    return [points[0], *means, points[-1]]


def smooth(values: list[float]) -> list[float]:
    """A centred moving average whose window shrinks towards the ends; short series stay as they are."""
    if len(values) < SMOOTH_FROM:
        return values
    radius = len(values) // 40
    windows = ((i, min(radius, i, len(values) - 1 - i)) for i in range(len(values)))
    return [sum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in windows]


def path(points: list[tuple]) -> str:
    """The `points` attribute of an SVG polyline."""
    return " ".join(f"{x:g},{y:g}" for x, y, *_ in points)


def _curve(name: str, points: list[Point], x: Axis, y: Axis) -> Curve:
    placed = [(x.pixel(step), y.pixel(value), step, value) for step, value in points]
    trend = [y.pixel(value) for value in smooth([value for _, value in points])]
    return Curve(name, placed, [(point[0], height) for point, height in zip(placed, trend)])


def _value_axis(low: float, high: float) -> Axis:
    if low > 0 and high / low > LOG_FROM:
        return Axis(low / 1.1, high * 1.1, BOTTOM, TOP, log=True)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - room, high + room, BOTTOM, TOP)


def _round_values(low: float, high: float) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / 4
    decade = 10 ** math.floor(math.log10(rough))
    step = next(m * decade for m in (1, 2, 5, 10) if m * decade >= 0.8 * rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _round_decades(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(decades) // 5)
    digits = (1, 2, 5) if len(decades) <= 3 else (1,)
    return [digit * 10.0**decade for decade in decades[::every] for digit in digits]
