"""What a benchmark says at its end: a table of figures beside their goals, and the same as JSON in the last line.

`python -m benchmarks.all` reads those last lines.
"""

import json
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.timing import Ratio, machine


class Figure(NamedTuple):
    """A measured value, what was hoped for, and how it was made."""

    name: str
    value: float
    unit: str = "x"
    goal: float | None = None
    at_most: bool = False  # whether the goal is a ceiling, not a floor
    low: float | None = None  # 10 and 90 % of repetitions
    high: float | None = None
    how: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def of_ratio(name: str, ratio: Ratio, goal: float | None = None, how: str = "") -> Figure:
    """How many times as fast something is."""
    return Figure(name, ratio.median, "x", goal, False, ratio.low, ratio.high, how)


def conclude(
    benchmark: str, figures: list[Figure], settings: dict[str, Any], more: dict[str, Any] | None = None
) -> int:
    """Print the table and the JSON; the exit code: 1 if a figure misses its goal."""
    show(benchmark, figures)
    rows = [figure._asdict() | {"met": figure.met} for figure in figures]
    settings = {
        name: value if isinstance(value, (int, float, bool)) else str(value) for name, value in settings.items()
    }
    found = {"benchmark": benchmark, "machine": machine(), "settings": settings, "figures": rows} | (more or {})
    print(json.dumps(found))
    return int(any(figure.met is False for figure in figures))


def show(title: str, figures: list[Figure]) -> None:
    """The table."""
    table = Table("figure", "found", "10-90 %", "goal", "", "how", title=title, title_justify="left")
    for figure in figures:
        spread = "" if figure.low is None else f"{figure.low:.3g}-{figure.high:.3g}"
        goal = "" if figure.goal is None else f"{'<=' if figure.at_most else '>='} {figure.goal:g}"
        verdict = {None: "", True: "met", False: "missed"}[figure.met]
        table.add_row(figure.name, f"{figure.value:.4g} {figure.unit}", spread, goal, verdict, figure.how)
    Console(width=120).print(table)
