"""The page of `calotype anomaly score`: one self-contained file, the strangest pictures first; it needs no script."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from calotype import report
from calotype.density import histogram, rows
from calotype.density.calibration import COMBINATION
from calotype.density.found import Found, Seen
from calotype.picture_files import display_name

_BROKEN = 100  # files that are named


class Plot(NamedTuple):
    """A score of all pictures beside that of held-out normal ones, and what it is."""

    histogram: histogram.Histogram
    sentence: str


def render(found: Found, measured: dict, anomalous: Tensor | None, settings, detector, words: dict[str, str]) -> str:
    """The whole page as text; `words` are sentences that the terminal says too."""
    strangest = found.strangest.ranked()
    sections = {"likely": found.likely(), "strangest": strangest, "others": found.others(strangest)}
    maker = _Rows(found, anomalous, detector)
    return rows.template("anomalies.html.jinja").render(
        name=text(settings.dir.resolve().name),
        folder=text(display_name(settings.dir)),
        found=found,
        facts=detector.facts,
        measured=measured,
        ranked=measured[COMBINATION].auc is not None,
        plots=[plot(name, found, anomalous, detector) for name in rows.combined_first(found.limits)],
        figures=figures(found, measured, anomalous, settings),
        words=words,
        broken=[text(fault).rpartition(": ")[::2] for _, fault in found.broken[:_BROKEN]],
        heat=rows.HEAT,
        mark=rows.fullness(settings.false_alarms, detector.facts.calibration),
        canvas=histogram,
        **{name: list(map(maker.row, seens)) for name, seens in sections.items()},
    )


def figures(found: Found, measured: dict, anomalous: Tensor | None, settings) -> list[report.Figure]:
    """The few numbers a reader wants first."""
    alarm = found.alarm
    shown = [report.Figure("Pictures", report.number(len(alarm)))]
    share = f"at {100 * settings.false_alarms:.3g} % of normal ones"
    shown.append(report.Figure("Alarms", report.number(int(alarm.sum())), share))
    if anomalous is not None:
        for name, part in (("normal", alarm[~anomalous]), ("other", alarm[anomalous])):
            shown.append(report.Figure(f"of the {name} ones", report.number(int(part.sum())), f"of {len(part):,}"))
    if best := measured[COMBINATION].auc:
        shown.append(report.Figure("ROC-AUC", f"{best.value:.3f}", f"{best.low:.3f} to {best.high:.3f}"))
    if found.broken:
        shown.append(report.Figure("Not readable", report.number(len(found.broken))))
    return shown


class _Rows:
    """Makes the rows of pictures that are shown."""

    def __init__(self, found: Found, anomalous: Tensor | None, detector):
        self.found, self.anomalous, self.detector = found, anomalous, detector
        self.scores, self.p = found.scores, found.p

    def row(self, seen: Seen) -> rows.Row:
        """The row of one of them."""
        i = seen.number
        scores, p = ({name: float(values[i]) for name, values in column.items()} for column in (self.scores, self.p))
        bars = rows.bars(scores, p, self.found.limits, self.detector.facts.calibration)
        kind = "" if self.anomalous is None else "other" if self.anomalous[i] else "normal"
        name = text(display_name(self.found.entries[i].file))
        return rows.row(name, kind, seen.pixels, seen.map, self.detector.normals[seen.neighbours], bars)


def plot(name: str, found: Found, anomalous: Tensor | None, detector) -> Plot:
    """The histogram of a score; pictures are parted where it is known which are normal."""
    scores = found.scores[name].numpy()
    groups: dict[str, np.ndarray] = {"held out": detector.calibration.normal[name].numpy()}
    if anomalous is None:
        groups["these"] = scores
    else:
        parts = {"normal": scores[~anomalous.numpy()], "other": scores[anomalous.numpy()]}
        groups |= {group: values for group, values in parts.items() if len(values)}
    return Plot(histogram.draw(name, groups["held out"], groups, found.limits[name]), detector.facts.scores[name])


def text(name: str) -> str:
    """A name as UTF-8 can hold it."""
    return name.encode("utf-8", "backslashreplace").decode()
