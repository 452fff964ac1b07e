"""A plot of growth as an SVG file: time over work, both as multiples of the first point, on logarithmic axes."""

from pathlib import Path

from calotype.curves import Axis, path

WIDTH, HEIGHT, MARGIN, LEGEND = 560, 420, 56, 150
COLOURS = ("#2563eb", "#c2410c", "#15803d", "#9333ea", "#0f766e", "#b91c1c", "#525252")

Points = list[tuple[float, float]]


def write_plot(file: Path, axes: dict[str, Points]) -> None:
    """Draw (work, seconds) of each axis; a dashed line is linear growth."""
    relative = {name: [(w / points[0][0], s / points[0][1]) for w, s in points] for name, points in axes.items()}
    every = [point for points in relative.values() for point in points]
    most = max(max(point) for point in every)
    x = Axis(1.0, most, MARGIN, WIDTH - LEGEND, log=True)
    y = Axis(min(0.5, *(s for _, s in every)), most, HEIGHT - MARGIN, MARGIN / 2, log=True)
    marks = [_grid(x, y), f'<polyline points="{path([(x.pixel(1), y.pixel(1)), (x.pixel(most), y.pixel(most))])}" '
             'fill="none" stroke="#999" stroke-dasharray="5 4"/>']  # fmt: skip
    for number, (name, points) in enumerate(relative.items()):
        marks.append(_curve(name, [(x.pixel(w), y.pixel(s)) for w, s in points], number))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    white = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    file.write_text("\n".join([head, white, *marks, "</svg>"]) + "\n", encoding="utf-8")


def _curve(name: str, points: Points, number: int) -> str:
    colour, top = COLOURS[number % len(COLOURS)], MARGIN + 20 * number
    dots = "".join(f'<circle cx="{a:g}" cy="{b:g}" r="3" fill="{colour}"/>' for a, b in points)
    line = f'<polyline points="{path(points)}" fill="none" stroke="{colour}" stroke-width="2"/>'
    left = WIDTH - LEGEND + 16
    label = f'<text x="{left + 18}" y="{top + 4}" font-size="12">{name}</text>'
    return f'{line}{dots}<rect x="{left}" y="{top - 5}" width="12" height="10" fill="{colour}"/>{label}'


def _grid(x: Axis, y: Axis) -> str:
    bottom, right = HEIGHT - MARGIN, WIDTH - LEGEND
    lines = [f'<path d="M{MARGIN} {MARGIN / 2}V{bottom}H{right}" fill="none" stroke="#333"/>']
    for place, value in x.ticks():
        lines.append(f'<text x="{place}" y="{bottom + 18}" font-size="11" text-anchor="middle">{value:g}</text>')
    for place, value in y.ticks():
        lines.append(f'<text x="{MARGIN - 6}" y="{place + 4}" font-size="11" text-anchor="end">{value:g}</text>')
    lines.append(f'<text x="{(MARGIN + right) / 2}" y="{HEIGHT - 14}" font-size="12" text-anchor="middle">work</text>')
    lines.append(f'<text x="14" y="{HEIGHT / 2}" font-size="12" transform="rotate(-90 14 {HEIGHT / 2})">time</text>')
    return "".join(lines)
