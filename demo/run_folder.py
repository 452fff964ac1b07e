"""The tab Run: what a run folder tells about itself, while it trains and afterwards."""

import functools
import threading
import time
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import jinja2
import numpy as np
from PIL import Image

from calotype import report
from calotype.demo.parts import PRIVATE, data_uri
from calotype.report import PARTS, Sheet

FRAMES = 5
LIVE_SECONDS = 90  # without a new line from which on a run counts as at rest
TICK_SECONDS = 3
_HERE = Path(__file__).parent
_SCRIPT = Path(report.__file__).with_name("stages.js").read_text(encoding="utf-8")
_STAGES = ("stage1_vae", "stage2_diffusion")
_READ = ("data.json", "metrics.json", "run.json", *(f"{stage}/metrics.jsonl" for stage in _STAGES))


class Contents(NamedTuple):
    """The parts of the tab as HTML."""

    heading: str
    films: str
    charts: str


class RunFolder:
    """A run folder that is read again only when a file in it has changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()
        self._shown: tuple[tuple, Contents] | None = None

    def stamp(self) -> tuple:
        """What changes whenever there is something new to show."""
        rows = tuple(_age(self.folder / name) for name in _READ)
        return (*rows, *(_age(self.folder / stage / "samples") for stage in _STAGES), self.is_live())

    def is_live(self) -> bool:
        """Whether a stage wrote a line a moment ago."""
        newest = max(_age(self.folder / stage / "metrics.jsonl")[0] for stage in _STAGES)
        return time.time() - newest / 1e9 < LIVE_SECONDS

    def contents(self) -> tuple[tuple, Contents]:
        """The stamp and the page that belongs to it."""
        with self._lock:
            stamp = self.stamp()
            if self._shown is None or self._shown[0] != stamp:
                self._shown = stamp, self._render()
            return self._shown

    def _render(self) -> Contents:
        stages = [report.read_stage(self.folder / stage) for stage in _STAGES]
        files = [report.read_json(self.folder / name) for name in ("data.json", "metrics.json", "run.json")]
        figures = report.headline(*files[:2], *stages, files[2])
        state = {"live": self.is_live(), "words": self._words(files[2], stages)}
        parts = _template().module
        strips = [list(filter(None, map(_frame, report.spread(stage.sheets, FRAMES)))) for stage in stages]
        return Contents(parts.heading(*stages, figures, state), parts.films(*strips), parts.charts(*stages))

    def _words(self, log: dict, stages: list[report.Stage]) -> str:
        """Where the run is, in a few words."""
        current = next((command["name"] for command in log.get("commands", []) if not command.get("finished")), None)
        steps = [stage.newest["step"] for stage in stages if "step" in stage.newest]
        step = f" · step {report.number(steps[-1])}" if steps else ""
        if self.is_live():
            return f"{current or 'training'} is running{step}"
        if current is None and (self.folder / "pipeline/model_index.json").is_file():
            return f"Finished{step}"
        return f"At rest{f' in {current}' if current else ''}{step}"


def find_run(model: Path) -> RunFolder | None:
    """The run that a model folder belongs to, or that `model` is itself; None where there is none."""
    folder = model.resolve()
    folder = folder.parent if folder.name == "pipeline" else folder
    started = any((folder / stage).is_dir() for stage in _STAGES)
    return RunFolder(folder) if started and any((folder / part).exists() for part in PARTS) else None


def run_tab(run: RunFolder, app: gr.Blocks) -> None:
    """Curves, film strips and diagnoses, which follow the run while it trains."""
    seen = gr.State(())
    heading = gr.HTML(elem_id="run-heading", apply_default_css=False)
    films = gr.HTML(elem_id="run-films", apply_default_css=False)
    charts = gr.HTML(elem_id="run-charts", apply_default_css=False, js_on_load=f"{_SCRIPT}\nfollowCharts(element);")

    def look(stamp: tuple) -> list:
        if stamp == run.stamp():
            return [gr.skip()] * 4
        new, contents = run.contents()
        return [new, *contents]

    shown = [seen, heading, films, charts]
    app.load(look, seen, shown, **PRIVATE)
    gr.Timer(TICK_SECONDS).tick(look, seen, shown, **PRIVATE)


def _age(path: Path) -> tuple[int, int]:
    """When a file or folder changed, in nanoseconds, and its size; zeros where there is none."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _frame(path: Path) -> Sheet | None:
    return _read_frame(path, _age(path))


@functools.lru_cache(maxsize=64)
def _read_frame(path: Path, age: tuple[int, int]) -> Sheet | None:
    """The left part of a sheet up to a gap between pictures, small; None for one that is still being written."""
    try:
        with Image.open(path) as image:
            part = image.convert("RGB").crop((0, 0, min(image.width, image.height * 8 // 5), image.height))
    except (OSError, SyntaxError):  # Pillow reports a broken PNG chunk as a SyntaxError
        return None
    gaps = np.flatnonzero((np.asarray(part) == 255).all((0, 2)))
    part = part.crop((0, 0, int(gaps.max(initial=0)) or part.width, part.height))
    part.thumbnail((480, 480))
    return Sheet(data_uri(part), *part.size, int(path.stem.rpartition("-")[2]))


@functools.cache
def _template() -> jinja2.Template:
    environment = report.environment()
    environment.loader = jinja2.ChoiceLoader([jinja2.FileSystemLoader(_HERE), environment.loader])
    return environment.get_template("run.html.jinja")
