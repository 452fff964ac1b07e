"""Scores as the geometry of a small SVG histogram; the template writes the markup."""

from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT, BOTTOM, MARGIN, TOP = 480, 170, 138, 12, 16
BINS = 44
_TICKS = 6


@dataclass(frozen=True)
class Scale:
    """Values on a line of pixels: straight where the usual ones are, ever more compressed outside (asinh)."""

    centre: float
    unit: float
    low: float  # after compression
    high: float

    @classmethod
    def of(cls, usual: np.ndarray, values: np.ndarray) -> "Scale":
        """The scale on which all of these values lie; its unit is the spread of the usual ones."""
        centre, (five, ninety_five) = float(np.median(usual)), np.quantile(usual, [0.05, 0.95])
        unit = float(ninety_five - five) or abs(centre) or 1.0
        both = np.arcsinh((np.concatenate([usual, values]) - centre) / unit)
        return cls(centre, unit, float(both.min()), float(both.max()))

    def share(self, values) -> np.ndarray:
        """Where values lie between the ends, from 0 to 1."""
        compressed = np.arcsinh((np.asarray(values) - self.centre) / self.unit)
        return (compressed - self.low) / ((self.high - self.low) or 1.0)

    def pixel(self, value: float) -> float:
        """Where a value lies."""
        return round(MARGIN + float(self.share(value)) * (WIDTH - 2 * MARGIN), 1)

    def ticks(self) -> list[tuple[float, float]]:
        """Evenly spaced pixels with their values."""
        places = np.linspace(self.low, self.high, _TICKS)
        values = self.centre + self.unit * np.sinh(places)
        return [(self.pixel(value), float(value)) for value in values]


@dataclass(frozen=True)
class Histogram:
    """A score of several groups of pictures: for each the outline as SVG points, and where an alarm begins."""

    name: str
    outlines: dict[str, str]
    ticks: list[tuple[float, float]]
    threshold: float  # pixel


def draw(name: str, usual: np.ndarray, groups: dict[str, np.ndarray], threshold: float) -> Histogram:
    """The histogram of `groups` of scores, none empty; each outline is as high as its own fullest bin allows."""
    groups = {group: _finite(values) for group, values in groups.items()}
    usual = _finite(usual)
    scale = Scale.of(usual, np.concatenate([*groups.values(), [threshold]]))
    outlines = {group: _outline(scale.share(values)) for group, values in groups.items()}
    return Histogram(name, outlines, scale.ticks(), scale.pixel(threshold))


def _outline(shares: np.ndarray) -> str:
    """The corners of a filled staircase over the axis, whose highest step reaches TOP."""
    counts, _ = np.histogram(np.clip(shares, 0, 1), BINS, (0, 1))
    heights = BOTTOM - counts / max(counts.max(), 1) * (BOTTOM - TOP)
    edges = np.linspace(MARGIN, WIDTH - MARGIN, BINS + 1)
    steps = [corner for x, end, y in zip(edges, edges[1:], heights) for corner in ((x, y), (end, y))]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in [(edges[0], BOTTOM), *steps, (edges[-1], BOTTOM)])


def _finite(values: np.ndarray) -> np.ndarray:
    """What is infinite, or no number, as the most extreme finite one."""
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    return np.nan_to_num(values, nan=finite.max(), posinf=finite.max(), neginf=finite.min())
