"""A few curves on logarithmic axes as an SVG file."""

from html import escape
from pathlib import Path

from calotype.curves import Axis, path

_LEFT, _RIGHT, _TOP, _BOTTOM, _WIDTH, _HEIGHT = 60, 620, 20, 320, 640, 370
_COLOURS = ("#1f5fa8", "#c2571a", "#3a7d44", "#7a4a9b", "#8a6d1a", "#444444")
_FONT = 'font-family="sans-serif" font-size="12"'


def write_svg(file: Path, series: dict[str, list[tuple[float, float]]], across: str, up: str) -> None:
    """Series of positive (x, y) with the words for both axes; a series may be empty."""
    points = [point for values in series.values() for point in values]
    axes = [_axis([point[i] for point in points], *ends) for i, ends in enumerate(((_LEFT, _RIGHT), (_BOTTOM, _TOP)))]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" {_FONT}>']
    parts += ['<rect width="100%" height="100%" fill="white"/>', *_grid(*axes, across, up)]
    for number, (name, values) in enumerate(series.items()):
        parts += _curve(name, values, number, *axes)
    file.write_text("\n".join([*parts, "</svg>", ""]))


def _axis(values: list[float], start: float, end: float) -> Axis:
    return Axis(min(values) / 1.15, max(values) * 1.15, start, end, log=True)


def _grid(x: Axis, y: Axis, across: str, up: str) -> list[str]:
    lines = []
    for at, value in x.ticks():
        lines.append(f'<path d="M{at:g} {_TOP}V{_BOTTOM}" stroke="#ddd"/>')
        lines.append(f'<text x="{at:g}" y="{_BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    for at, value in y.ticks():
        lines.append(f'<path d="M{_LEFT} {at:g}H{_RIGHT}" stroke="#ddd"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{at + 4:g}" text-anchor="end">{value:g}</text>')
    lines.append(f'<text x="{(_LEFT + _RIGHT) / 2:g}" y="{_BOTTOM + 40}" text-anchor="middle">{escape(across)}</text>')
    return [*lines, f'<text x="14" y="14">{escape(up)}</text>']


def _curve(name: str, values: list[tuple[float, float]], number: int, x: Axis, y: Axis) -> list[str]:
    colour, placed = _COLOURS[number % len(_COLOURS)], [(x.pixel(a), y.pixel(b)) for a, b in values]
    lines = [f'<polyline points="{path(placed)}" fill="none" stroke="{colour}" stroke-width="2"/>']
    lines += [f'<circle cx="{a:g}" cy="{b:g}" r="3" fill="{colour}"/>' for a, b in placed]
    at = _TOP + 18 + 18 * number
    return [*lines, f'<text x="{_RIGHT - 8}" y="{at}" text-anchor="end" fill="{colour}">{escape(name)}</text>']
