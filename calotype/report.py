"""One self-contained HTML page per run: everything a run folder knows about itself, nothing loaded from elsewhere."""

import base64
import io
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image

from calotype import curves
from calotype.errors import UserError

HERE = Path(__file__).parent
TEMPLATE = HERE / "report.html.jinja"
FRAMES = 6  # sheets on the film strip
CLASSES_SHOWN = 16
BAD_SHOWN = 50
SHORT_FOR = {"psnr", "ssim", "lpips", "fid", "kid", "kl"}
PARTS = ("data.json", "stage1_vae", "stage2_diffusion", "flow", "pipeline", "metrics.json", "run.json")


@dataclass(frozen=True)
class Figure:
    """A headline: a number, what it is, and a word on how it came about."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Sheet:
    """A picture ready to be embedded."""

    uri: str
    width: int
    height: int
    step: int | None = None


@dataclass(frozen=True)
class Stage:
    """What one stage left in its folder; `folded` are the curves that belong to no split, such as the learning rate.

    `said` are the diagnoses while it trained, each with its step.
    """

    settings: dict
    charts: list[curves.Chart]
    folded: list[curves.Chart]
    newest: dict
    sheets: list[Path]
    said: list[tuple[int, str]]

    @property
    def started(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.settings or self.newest or self.sheets)


def main(settings) -> None:
    """Write the report of `settings.run` and say where it lies."""
    print(write_report(settings.run))


def write_report(run: Path) -> Path:
    """Write RUN_DIR/report.html in one atomic step and return its path."""
    if not any((run / part).exists() for part in PARTS):
        raise UserError(f"{run}: no run here (looked for {', '.join(PARTS)}); give the folder named by --out")
    page = run / "report.html"
    unfinished = run / f".report-{os.getpid()}.html"
    try:
        unfinished.write_text(render(run), encoding="utf-8")
        os.replace(unfinished, page)
    finally:
        unfinished.unlink(missing_ok=True)
    return page


def render(run: Path) -> str:
    """The whole page as text."""
    return environment().get_template(TEMPLATE.name).render(**contents(run))


def environment() -> jinja2.Environment:
    """The templates beside this file, with the words and numbers that they use."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {
        "number": number,
        "duration": duration,
        "path": curves.path,
        "key": split_key,
        "named": named,
    }
    made.globals["canvas"] = curves
    return made


def contents(run: Path) -> dict:
    """Everything the template needs, read from the run folder."""
    data, metrics, log = (read_json(run / name) for name in ("data.json", "metrics.json", "run.json"))
    vae, diffusion = read_stage(run / "stage1_vae"), read_stage(run / "stage2_diffusion")
    flow = read_stage(run / "flow")
    return {
        "name": run.resolve().name,
        "data": data,
        "classes": class_bars(data.get("classes", {})),
        "bad_shown": BAD_SHOWN,
        "vae": vae,
        "diffusion": diffusion,
        "flow": flow,
        "reconstruction": next(filter(None, (read_sheet(p, 1600) for p in reversed(vae.sheets))), None),
        "strip": film_strip(diffusion),
        "flow_strip": film_strip(flow),
        "final": read_sheet(run / "pipeline" / "samples.png", 1600),
        "evaluation": read_json(run / "stage1_vae" / "evaluation.json"),
        "metrics": metrics,
        "audit": read_json(run / "evaluation" / "memorisation.json"),
        "pairs": read_sheet(run / "evaluation" / "memorisation.png", 1600),
        "log": log,
        "figures": headline(data, metrics, vae, diffusion, log),
    }


# Reading


def read_json(path: Path) -> dict:
    """The JSON object in a file, empty where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); run the command that writes it again") from None


def read_stage(folder: Path) -> Stage:
    """The settings, curves and sample sheets of one stage."""
    rows = read_rows(folder / "metrics.jsonl")
    charts, folded = draw_charts(rows)
    newest = {key: value for row in rows for key, value in row.items()}
    sheets = sorted(folder.glob("samples/step-*.png"))
    return Stage(read_json(folder / "config.json"), charts, folded, newest, sheets, sentences(rows))


def film_strip(stage: Stage) -> list[Sheet]:
    """Some of a stage's sample sheets, from the first to the last."""
    return [sheet for path in spread(stage.sheets, FRAMES) if (sheet := read_sheet(path, 640))]


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl in the order of steps; a torn line is passed over."""
    if not path.exists():
        return []
    rows = filter(None, map(_row, path.read_text(encoding="utf-8", errors="replace").splitlines()))
    return sorted(rows, key=lambda row: row["step"])


def _row(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def read_sheet(path: Path, longest: int) -> Sheet | None:
    """A picture as a data URI, made smaller where a side exceeds `longest`; None for a missing or torn file."""
    try:
        original = path.read_bytes()
        image = Image.open(io.BytesIO(original))
        image.load()
    except (OSError, SyntaxError):  # Pillow reports a broken PNG chunk as a SyntaxError
        return None
    kind = image.get_format_mimetype()
    if max(image.size) > longest:
        image.thumbnail((longest, longest))
        original, kind = _webp(image), "image/webp"
    step = re.search(r"step-(\d+)", path.name)
    uri = f"data:{kind};base64,{base64.b64encode(original).decode()}"
    return Sheet(uri, *image.size, int(step[1]) if step else None)


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    return buffer.getvalue()


# Shaping


def sentences(rows: list[dict]) -> list[tuple[int, str]]:
    """What was said and at which step; what a resumed run says again counts once."""
    return list(dict.fromkeys((row["step"], row["said"]) for row in rows if isinstance(row.get("said"), str)))


def draw_charts(rows: list[dict]) -> tuple[list[curves.Chart], list[curves.Chart]]:
    """Charts of the quantities measured on a split, and of those that are not, one for each quantity."""
    series: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("step", "seconds", "said") and _is_number(value):
                name, split = split_key(key)
                # A resumed run repeats steps: the later line is the one that counts.
                series.setdefault(name, {}).setdefault(split, {})[row["step"]] = value
    return draw_group(series, with_split=True), draw_group(series, with_split=False)


def draw_group(series: dict[str, dict[str, dict[int, float]]], with_split: bool) -> list[curves.Chart]:
    """The charts with or without splits; the first of an odd number takes a whole row of the page."""
    chosen = {name: parts for name, parts in series.items() if any(parts) == with_split}
    widths = [curves.WIDE if len(chosen) % 2 else curves.WIDTH] + [curves.WIDTH] * len(chosen)
    return [
        curves.draw(name, {split: sorted(points.items()) for split, points in sorted(parts.items())}, width)
        for (name, parts), width in zip(chosen.items(), widths)
    ]


def split_key(key: str) -> tuple[str, str]:
    """'psnr[val]' -> ('psnr', 'val'); 'lr' -> ('lr', '')."""
    name, _, rest = key.partition("[")
    return name, rest.removesuffix("]")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def spread(items: list, count: int) -> list:
    """At most `count` items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def class_bars(classes: dict[str, int]) -> dict:
    """The largest classes with their share of the largest, and how many are left out."""
    ranked = sorted(classes.items(), key=lambda item: -item[1])
    largest = max(classes.values(), default=0) or 1
    shown = [(name, count, 100 * count / largest) for name, count in ranked[:CLASSES_SHOWN]]
    return {"shown": shown, "more": len(ranked) - len(shown)}


def headline(data: dict, metrics: dict, vae: Stage, diffusion: Stage, log: dict) -> list[Figure]:
    """The few numbers a reader wants first."""
    figures = [_metric_figure(*item) for item in list(metrics.items())[:3]]
    for stage, charts in (("Autoencoder", vae.charts), ("Diffusion", diffusion.charts)):
        if f"{stage.lower()}_loss[val]" not in metrics:  # else it has been said
            figures += _loss_figure(stage, charts)
    if counts := data.get("counts"):
        figures.append(Figure("Images", number(sum(counts.values())), f"{number(counts.get('val', 0))} held out"))
    if classes := data.get("classes"):
        figures.append(Figure("Classes", number(len(classes))))
    if commands := log.get("commands"):
        total = sum(command["seconds"] for command in commands)
        figures.append(Figure("Total time", duration(total), f"{len(commands)} commands"))
    return figures


def _metric_figure(key: str, metric: dict) -> Figure:
    name, split = split_key(key)
    unit = " dB" if name == "psnr" else ""
    return Figure(f"{named(name)} {split}".strip(), number(metric["value"]) + unit, f"{number(metric['n'])} images")


def _loss_figure(stage: str, charts: list[curves.Chart]) -> list[Figure]:
    losses = {curve.name: curve for chart in charts if chart.title == "loss" for curve in chart.curves}
    if not losses:
        return []
    split = "val" if "val" in losses else "train"
    *_, step, value = losses[split].points[-1]
    return [Figure(f"{stage} loss", number(value), f"{split}, step {number(step)}")]


def named(quantity: str) -> str:
    """A quantity as a reader would write it: 'psnr' -> 'PSNR', 'images_per_second' -> 'images per second'."""
    return quantity.upper() if quantity in SHORT_FOR else quantity.replace("_", " ")


def number(value) -> str:
    """A number with as many digits as a reader can use; anything else as text."""
    if not _is_number(value):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}".replace("e-0", "e-")


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours, days = (int(seconds // unit) for unit in (60, 3600, 86400))
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(seconds % 60)} s"
