"""`calotype plan`: what can be trained from these pictures in that time on this machine, measured in a minute or so."""

import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rich.console import Console

from calotype import planning
from calotype.config import PRESET_IMAGE_SIZE, PROCEDURAL, height_width
from calotype.doctor import leaving_on_signals
from calotype.errors import UserError
from calotype.plan_measure import Measured, Probes, Setup, measure, stage_settings
from calotype.plan_source import Found, look_at
from calotype.plan_words import load_now, show
from calotype.planning import Prediction

_FACTORS = (2, 4, 8, 16, 32)
_LEAST_LATENT = 4  # elements a side, when time makes the factor larger
_HOPELESS = 4.0  # a larger preset is not tried where a rough guess needs so many times the hours


@dataclass(frozen=True)
class Plan:
    """A set-up with its prediction, the command that does it, what else was tried, and a sentence on other work."""

    measured: Measured
    prediction: Prediction
    command: list[str]
    others: dict[str, Measured]
    load: str


def main(settings) -> None:
    """Measure, choose, and print a table and a command."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    began = time.monotonic()
    with console.status("Looking at the pictures and the machine …") if sys.stdout.isatty() else nullcontext():
        plan = make(settings)
    show(console, settings, plan, time.monotonic() - began)


def make(settings) -> Plan:
    """The plan for these settings; nothing is left behind. Raises UserError."""
    with leaving_on_signals(), tempfile.TemporaryDirectory(prefix="calotype-plan-", ignore_cleanup_errors=True) as room:
        probes = Probes(Path(room))
        try:
            return _make(settings, Path(room), probes)
        finally:
            probes.end()


def _make(settings, room: Path, probes: Probes) -> Plan:
    load = load_now()
    found = look_at(settings, room)
    measured: dict[str, Measured] = {}
    for preset in _presets(settings, found.own):
        if measured and not _worth_a_try(settings, found, list(measured.values())[-1], preset):
            break
        measured[preset] = measure(settings, found, _setup(settings, found, preset), probes)
    if len(measured) == 1 and settings.factor is None:
        measured = {name: _smaller_latents(settings, found, one, probes) for name, one in measured.items()}
    sources, costs = ({name: getattr(one, part) for name, one in measured.items()} for part in ("source", "costs"))
    chosen = measured[planning.choose(sources, costs, settings.hours)]
    prediction = planning.plan_for(chosen.source, chosen.costs, settings.hours)
    _refuse_too_short(settings, chosen, prediction, load)
    return Plan(chosen, prediction, command(settings, chosen.setup, prediction.minutes), measured, load)


def _refuse_too_short(settings, chosen: Measured, prediction: Prediction, load: str) -> None:
    if prediction.minutes >= 0.05 and prediction.seconds <= 1.05 * 3600 * settings.hours:
        return
    least = planning.least_hours(chosen.source, chosen.costs, planning.ENOUGH)
    raise UserError(
        f"--hours {settings.hours:g} is too short: beside training, these pictures take "
        f"{planning.predict(chosen.source, chosen.costs, 0.05).seconds / 60:.1f} minutes to read, encode, draw and "
        f"measure; give {1.05 * least:.2g} or more. {load}"
    )


def _presets(settings, own: int | None) -> list[str]:
    """Those that may be chosen, by size: the given one, or all that are not meant for far larger pictures."""
    if settings.preset:
        return [settings.preset]
    side = min(height_width(settings.image_size)) if settings.image_size else own
    usual = {name: int(size) for name, size in PRESET_IMAGE_SIZE.items()}
    return [name for name, size in usual.items() if side is None or size <= 2 * side or name == "tiny"]


def _setup(settings, found: Found, preset: str) -> Setup:
    one, two = (stage_settings(number, preset) for number in (1, 2))
    usual = int(PRESET_IMAGE_SIZE[preset])
    if settings.image_size:
        size = height_width(settings.image_size)
        factor = settings.factor or planning.factor_for(one.factor, min(size))
    else:
        factor = settings.factor or planning.factor_for(one.factor, min(found.own or usual, usual))
        side = planning.side_for(usual, found.own, factor * 2 ** (two.depth - 1))
        size = (side, side)
    enlarged = found.own is not None and found.own < min(size)
    return Setup(preset, factor, size, settings.fit or ("pad" if enlarged else None), settings.batch_size)


def _worth_a_try(settings, found: Found, smaller: Measured, preset: str) -> bool:
    """Whether a larger preset could have enough steps in time, by the cost of a smaller one and its size."""
    setup = _setup(settings, found, preset)
    ratio = _rough(setup, stage_settings(2, preset)) / _rough(smaller.setup, stage_settings(2, smaller.setup.preset))
    needed = planning.ENOUGH * smaller.costs.two.usual * smaller.costs.two.step / 3600 * ratio
    return needed < _HOPELESS * settings.hours


def _rough(setup: Setup, stage) -> float:
    """Proportional to the arithmetic of a preset's usual steps: images, positions of the latents, weights."""
    positions = prod(setup.size) / setup.factor**2
    return stage.LENGTHS[setup.preset] * stage.batch_size * positions * stage.width**2 * stage.layers


def _smaller_latents(settings, found: Found, measured: Measured, probes: Probes) -> Measured:
    """Where time is short for large latents, smaller ones: the next factor, while the run would have too few steps."""
    while True:
        prediction = planning.plan_for(measured.source, measured.costs, settings.hours)
        factor = 2 * measured.setup.factor
        size = measured.setup.size
        enough = planning.completeness(measured.costs, prediction) >= planning.ENOUGH
        if enough or factor not in _FACTORS or min(size) // factor < 2 * _LEAST_LATENT:
            return measured
        if any(side % factor for side in size):
            return measured
        setup = Setup(measured.setup.preset, factor, size, measured.setup.fit, measured.setup.batch_size)
        other = measure(settings, found, setup, probes)
        if planning.completeness(
            other.costs, planning.plan_for(other.source, other.costs, settings.hours)
        ) < 1.2 * planning.completeness(measured.costs, prediction):
            return measured  # it is not the latents that take the time
        measured = other


def command(settings, setup: Setup, minutes: float) -> list[str]:
    """The words of `calotype run` that do what was planned; what a preset says anyway is left out."""
    one = stage_settings(1, setup.preset)
    words = ["calotype", "run", settings.source, "--preset", setup.preset]
    size = "x".join(map(str, setup.size if setup.size[0] != setup.size[1] else setup.size[:1]))
    words += ["--image-size", size] if size != PRESET_IMAGE_SIZE[setup.preset] else []
    words += ["--fit", setup.fit] if setup.fit else []
    words += ["--channels", str(settings.channels)] if settings.channels else []
    words += ["--val", settings.val] if settings.val else []
    words += ["--factor", str(setup.factor)] if setup.factor != one.factor else []
    words += ["--batch-size", str(setup.batch_size)] if setup.batch_size else []
    words += ["--precision", settings.precision] if settings.precision != "auto" else []
    words += ["--max-minutes", f"{minutes:.4g}"]
    return [*words, "--out", str(_free_folder(settings))]


def _free_folder(settings) -> Path:
    """runs/NAME, or the first number behind it that is not taken."""
    if settings.out is not None:
        return settings.out
    name = settings.source.replace(":", "-") if settings.source in PROCEDURAL else Path(settings.source).resolve().name
    taken = (Path("runs") / (f"{name}-{i}" if i > 1 else name) for i in range(1, 10_000))
    return next(folder for folder in taken if not folder.exists())
