"""`calotype anomaly score`: how strange the pictures of a folder are, as a table, a CSV file and a page."""

import csv
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from calotype.checkpoint import write_text
from calotype.density import page
from calotype.density.anomaly_config import AnomalyScoreSettings
from calotype.density.calibration import COMBINATION, TYPICALITY
from calotype.density.detector import Detector
from calotype.density.found import Found
from calotype.density.ranking import Estimate, average_precision, roc_auc
from calotype.disk import make_folder
from calotype.errors import UserError
from calotype.folder import Entry, list_pictures, on_disk
from calotype.images import draft_for, load_image
from calotype.picture_files import UnreadableImage, display_name
from calotype.reading import each

NORMAL = ("normal", "good")  # sub-folders that are taken for normal if nothing is said
SIMPLE = "A raw likelihood can prefer simple pictures, of a kind it never saw, to normal ones (Nalisnick et al. 2019)"
_NAMED = 10  # broken files that are named in the terminal
_STRANGEST = 5
_WIDTH = 110  # of the table where the output is no terminal


class Measured(NamedTuple):
    """How many pictures raise the alarm by a score, and how well it ranks where it is known what is normal."""

    alarms: int
    auc: Estimate | None
    precision: Estimate | None


def main(settings: AnomalyScoreSettings) -> None:
    """Score, print, and write OUT/scores.csv and OUT/index.html."""
    entries = _entries(settings.dir)
    detector = Detector.open(settings.model, settings.precision)
    normal = normal_labels(entries, settings, detector.facts.classes)
    limits = {name: detector.threshold(settings.false_alarms, name) for name in detector.facts.scores}
    found = look_at(detector, entries, settings, limits)
    anomalous = _anomalous(found.entries, normal)
    measured = {name: measure(scores, limits[name], anomalous) for name, scores in found.scores.items()}
    words = {"alarms": alarms(found, anomalous), "checked": checked(found, settings, detector), "simple": simple(found)}
    _print(found, measured, anomalous is not None, words)
    make_folder(settings.out)
    write_text(settings.out / "scores.csv", table_of(found, entries))
    write_text(settings.out / "index.html", page.render(found, measured, anomalous, settings, detector, words))
    print(f"Wrote {settings.out / 'scores.csv'} and {settings.out / 'index.html'}.")


def look_at(
    detector: Detector, entries: list[Entry], settings: AnomalyScoreSettings, limits: dict[str, float]
) -> Found:
    """Read and examine pictures batch by batch; raises UserError where none can be read."""
    found = Found(limits, settings.show)
    starts = range(0, len(entries), settings.batch_size)
    for start in track(starts, "Looking at pictures", transient=True):
        batch = entries[start : start + settings.batch_size]
        read = list(zip(batch, each(partial(_read, detector, settings.dir), batch), strict=True))
        found.broken += [(entry, x) for entry, x in read if isinstance(x, str)]
        good = [(entry, x) for entry, x in read if not isinstance(x, str)]
        if good:
            x = torch.cat([x for _, x in good])
            found.add([entry for entry, _ in good], x, detector.examine(x))
    if not found.entries:
        raise UserError(
            f"DIR {settings.dir}: none of its {len(entries)} files can be read; first: {found.broken[0][1]}."
        )
    return found


def _read(detector: Detector, root: Path, entry: Entry) -> Tensor | str:
    """A picture (1, C, H, W) as the detector wants it, or why it cannot be read."""
    facts = detector.facts
    try:
        image = load_image(
            on_disk(root, entry.file), channels=facts.channels, draft_size=draft_for(tuple(facts.image_size))
        )
        return detector.prepare(image)
    except UnreadableImage as error:
        return str(error)


def _entries(folder: Path) -> list[Entry]:
    try:
        return list_pictures(folder)
    except UserError as error:
        message = str(error).replace("SOURCE", "DIR", 1).replace(", or `shapes`", "")
        raise UserError(message) from None


def normal_labels(entries: list[Entry], settings: AnomalyScoreSettings, trained: list[str]) -> set[str]:
    """The labels that are normal: those that are named, else NORMAL, else those of training; empty: not known."""
    labels = {entry.label for entry in entries} - {""}
    for name in settings.normal:
        if name not in labels:
            there = f"it has {_some(sorted(labels))}" if labels else "it has none, and without one no picture is known"
            raise UserError(f"--normal {name}: DIR {settings.dir} has no sub-folder of that name; {there}.")
    usual = {label for label in labels if label.lower() in NORMAL}
    return set(settings.normal) or usual or labels & set(trained)


def _some(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(display_name, names[:most])) + more


def _anomalous(entries: list[Entry], normal: set[str]) -> Tensor | None:
    """Which pictures (N,) are no normal ones; None where that is not known."""
    return torch.tensor([entry.label not in normal for entry in entries]) if normal else None


def measure(scores: Tensor, limit: float, anomalous: Tensor | None) -> Measured:
    """The alarms of a score, and with both kinds of pictures there how well it tells them apart."""
    alarms = int((scores >= limit).sum())
    if anomalous is None or anomalous.all() or not anomalous.any():
        return Measured(alarms, None, None)
    return Measured(alarms, roc_auc(scores, anomalous), average_precision(scores, anomalous))


# What is written


def table_of(found: Found, entries: list[Entry]) -> str:
    """The CSV: a line a picture in the order of the folder, empty after the name where it cannot be read."""
    names = [COMBINATION, *(name for name in found.limits if name != COMBINATION)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["file", "label", "alarm", "p", *names])
    scores = found.scores
    columns = [scores[name].tolist() for name in names]
    rows = zip(found.alarm.int().tolist(), found.p[COMBINATION].tolist(), *columns, strict=True)
    lines = {entry.file: row for entry, row in zip(found.entries, rows, strict=True)}
    for entry in entries:
        values = lines.get(entry.file, [""] * (len(names) + 2))
        writer.writerow([_text(entry.file), _text(entry.label), *map(_number, values)])
    return stream.getvalue()


def _text(name: str) -> str:
    """A name as UTF-8 can hold it."""
    return name.encode("utf-8", "backslashreplace").decode()


def _number(value) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


# What is said


def _print(found: Found, measured: dict[str, Measured], known: bool, words: dict[str, str]) -> None:
    for line in _broken(found):
        print(line)
    console = Console(markup=False, highlight=False)
    console = console if console.is_terminal else Console(width=_WIDTH, markup=False, highlight=False)
    console.print(_table(found, measured, known))
    for line in (words["alarms"], words["checked"], "The strangest:", *_strangest(found), words["simple"]):
        print(line)


def _broken(found: Found) -> Iterator[str]:
    for _, fault in found.broken[:_NAMED]:
        yield f"Not read: {fault.rstrip('.')}."
    if len(found.broken) > _NAMED:
        yield f"Not read: {len(found.broken) - _NAMED:,} more; they have no score in scores.csv."


def _table(found: Found, measured: dict[str, Measured], known: bool) -> Table:
    """A row a score."""
    rows = Table(box=None, pad_edge=False)
    for title in ("score", "alarms", "from", *(("ROC-AUC", "average precision") if known else ())):
        rows.add_column(title, justify="left" if title == "score" else "right", no_wrap=True)
    for name, one in measured.items():
        ranks = [_interval(one.auc), _interval(one.precision)] if known else []
        rows.add_row(name, f"{one.alarms:,}", f"{found.limits[name]:.4g}", *ranks)
    return rows


def _interval(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def alarms(found: Found, anomalous: Tensor | None) -> str:
    """One sentence: how many pictures raise the alarm."""
    alarm = found.alarm
    count = f"{int(alarm.sum()):,} of {len(alarm):,} pictures raise the alarm"
    if anomalous is None:
        return f"{count}."
    parts = [(alarm[~anomalous], "normal"), (alarm[anomalous], "other")]
    each_kind = (f"{int(part.sum()):,} of {len(part):,} {name} ones" for part, name in parts if len(part))
    return f"{count}: {', '.join(each_kind)}."


def checked(found: Found, settings: AnomalyScoreSettings, detector: Detector) -> str:
    """One or two sentences: where the alarm begins, and how often others that are normal reached it."""
    facts = detector.facts
    share = f"{100 * settings.false_alarms:.3g} %"
    words = (
        f"The alarm begins at a {COMBINATION} of {found.limits[COMBINATION]:.4g}, which {share} of normal pictures "
        f"reach, by {facts.calibration:,} held-out ones."
    )
    for one in facts.false_alarms:
        if one["rate"] == settings.false_alarms:
            interval = f"95 % interval {one['low']:.1%} to {one['high']:.1%}"
            words += f" Of {facts.check:,} others, held out too, {one['share']:.1%} did ({interval})."
    return words


def _strangest(found: Found) -> Iterator[str]:
    values, order = found.scores[COMBINATION].sort(descending=True, stable=True)
    p = found.p[COMBINATION]
    for value, i in list(zip(values.tolist(), order.tolist(), strict=True))[:_STRANGEST]:
        yield f"  {display_name(found.entries[i].file)}  {COMBINATION} {value:.4g}, p {float(p[i]):.3g}"


def simple(found: Found) -> str:
    """One sentence on raw likelihoods, with how often one of them was misled here."""
    likely = found.too_likely(found.scores, found.p)
    if not likely.any():
        return f"{SIMPLE}; none of these pictures is a case of it."
    counts = [f"{name} finds {int(row.sum()):,}" for name, row in zip(found.raw, likely, strict=True) if row.any()]
    return (
        f"{SIMPLE}: here {', '.join(counts)} likelier than 95 % of held-out normal pictures, though {COMBINATION} or "
        f"{TYPICALITY} raises the alarm."
    )
