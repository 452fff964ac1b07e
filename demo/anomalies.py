"""The tab Anomalies: how strange a visitor's pictures are to somebody who knows the normal ones."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from calotype.demo import parts
from calotype.demo.arithmetic import pictures_field
from calotype.demo.parts import MODEL, PRIVATE, for_visitors
from calotype.demo.studio import clamp
from calotype.demo.uploads import open_picture
from calotype.errors import UserError

MOST_PICTURES = 8
LEAST_RATE, USUAL_RATE, MOST_RATE = 0.005, 0.05, 0.25
HINT = "Drop pictures to see how strange they are."
EMPTY = "What is strange appears here, beside the nearest normal pictures."


class Guard:
    """A detector that serves one visitor at a time; until it is loaded, visitors wait."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.detector: Any = None
        self.tell: Callable[[str], object] = lambda words: None  # a visitor who waits
        self._lock = threading.Lock()

    @classmethod
    def of_model(cls, model: Path) -> "Guard | None":
        """The guard of a run, or of the run that a model folder belongs to; None where it has none."""
        folder = model.resolve()
        folder = folder.parent if folder.name in ("pipeline", "anomaly") else folder
        return cls(folder) if (folder / "anomaly" / "anomaly.json").is_file() else None

    def load(self) -> "Guard":
        """Read the detector; raises UserError."""
        from calotype.density.detector import Detector

        self.detector = Detector.open(self.folder)
        return self

    def load_later(self) -> Callable[[], None]:
        """Let everybody wait until what this returns was called, which may be in another thread."""
        self._lock.acquire()

        def load() -> None:
            self.load()
            self._lock.release()

        return load

    @contextmanager
    def working(self) -> Iterator[Any]:
        """The detector, while nobody else has it."""
        if self.detector is None:
            self.tell("The detector is still being loaded; this goes on as soon as it is there.")
        with self._lock:
            yield self.detector


class Finding(NamedTuple):
    """What was found of one picture: the row that shows it, its scores and its p."""

    row: Any
    scores: dict[str, float]
    p: dict[str, float]


def anomalies_tab(guard: Guard) -> None:
    """Pictures on the left, what is strange about them on the right, and how many false alarms are bearable."""
    guard.tell = gr.Info
    with gr.Row(elem_classes="bench"):
        with gr.Column(scale=1, min_width=340):
            upload = pictures_field("Pictures of your own", "crisp")
            rate = gr.Slider(LEAST_RATE, MOST_RATE, value=USUAL_RATE, step=0.005, label="Share of false alarms",
                             info="of normal pictures that may raise the alarm", buttons=[])  # fmt: skip
            note = parts.status_line(HINT)
        with gr.Column(scale=3, min_width=360):
            shown = gr.HTML(parts.empty(EMPTY), label="Findings", apply_default_css=False)
    findings = gr.State([])
    outcome = [shown, note, findings]
    upload.upload(partial(examine, guard), [upload, rate], outcome, api_name="anomalies", **MODEL)
    rate.change(partial(judge, guard), [findings, rate], [shown, note], trigger_mode="always_last", **PRIVATE)
    upload.change(cleared, upload, outcome, **PRIVATE)


def cleared(items) -> tuple:
    """The tab as it was, once all pictures were taken away."""
    if items:
        return gr.skip(), gr.skip(), gr.skip()
    return parts.empty(EMPTY), HINT, []


def examine(guard: Guard, items, rate) -> tuple[str, str, list[Finding]]:
    """What a detector finds of a visitor's pictures, as the tab shows it."""
    with for_visitors():
        rate = clamp("share of false alarms", rate, LEAST_RATE, MOST_RATE)
        if not items:
            raise UserError("no picture yet; drop one on the field first")
        if len(items) > MOST_PICTURES:
            raise UserError(f"{len(items)} pictures are more than {MOST_PICTURES}; drop fewer")
        with guard.working() as detector:
            findings = found(detector, [file for file, _ in items])
            return *verdict(detector, findings, rate), findings


def judge(guard: Guard, findings: list[Finding], rate) -> tuple:
    """The same findings at another share of false alarms."""
    if not findings:
        return gr.skip(), gr.skip()
    with for_visitors():
        rate = clamp("share of false alarms", rate, LEAST_RATE, MOST_RATE)
        return verdict(guard.detector, findings, rate)


def found(detector, files: list[str]) -> list[Finding]:
    """Scores and maps of uploaded pictures; raises UserError for one that cannot be read."""
    import torch

    from calotype.density import rows
    from calotype.images import denormalize

    pictures = [open_picture(file, detector.facts.channels) for file in files]
    x = torch.cat([detector.prepare(picture) for picture in pictures])
    examined, pixels = detector.examine(x), denormalize(x)
    findings = []
    for i, map in enumerate(examined.maps):
        scores, p = ({name: float(values[i]) for name, values in part.items()} for part in examined[:2])
        row = rows.row(Path(files[i]).name, "", pixels[i], map, detector.normals[examined.neighbours[i]], [])
        findings.append(Finding(row, scores, p))
    return findings


def verdict(detector, findings: list[Finding], rate: float) -> tuple[str, str]:
    """The findings as HTML, and how many of them raise the alarm, in words; raises UserError for too small a rate."""
    from calotype.density import rows

    normals = detector.facts.calibration
    limits = {name: detector.threshold(rate, name) for name in findings[0].scores}
    judged = [one.row._replace(bars=rows.bars(one.scores, one.p, limits, normals)) for one in findings]
    judged.sort(key=lambda row: -row.bars[0].value)
    macros = rows.macros()
    page = f'<div class="run">{macros.legend(rows.HEAT)}{macros.listed(judged, rows.fullness(rate, normals))}</div>'
    said = f"**{_said(sum(row.alarm for row in judged), len(judged))}**"
    return page, f"{said} at a share of {rate:.3g} false alarms, by {normals:,} held-out normal pictures."


def _said(alarms: int, count: int) -> str:
    if count == 1:
        return f"This picture raises {'the' if alarms else 'no'} alarm"
    return f"{alarms or 'None'} of {count} pictures raise{'s' if alarms < 2 else ''} the alarm"
