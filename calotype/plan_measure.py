"""What a set-up of a run costs on this machine: both stages are probed, each in a process of its own.

The ground floor knows no stage: only command lines, and what the probes tell.
"""

from dataclasses import dataclass
from math import prod

from calotype import cli, planning
from calotype.errors import UserError
from calotype.plan_probes import Probes
from calotype.plan_source import Found
from calotype.planning import Cost, Costs, Source, StageCost

_LIMIT = 2.5  # seconds that the steps of a stage are timed for


@dataclass(frozen=True)
class Setup:
    """What of a run is chosen here."""

    preset: str
    factor: int
    size: tuple[int, int]
    fit: str | None
    batch_size: int | None  # None: the preset's, one for each stage


@dataclass(frozen=True)
class Measured:
    """What the probes say of a set-up; `costs` are seconds by the clock, `cpu` those of the processor."""

    setup: Setup
    source: Source
    costs: Costs
    cpu: Costs
    free: int


def stage_settings(number: int, preset: str):
    """What a preset stands for in a stage."""
    words = {1: ["train-vae", "shapes"], 2: ["train-diffusion", "--latents", "latents"]}[number]
    return cli.settings_of([*words, "--preset", preset, "--out", "unused"])


def measure(settings, found: Found, setup: Setup, probes: Probes) -> Measured:
    """Probe both stages; again with smaller batches where the first do not fit into memory."""
    measured = _measure_once(settings, found, setup, probes)
    kept = measured.source.train * measured.source.pixels if measured.source.kept else 0
    stages = (measured.costs.one, measured.costs.two)
    fitting = [planning.batch_that_fits(stage, measured.free, kept) for stage in stages]
    if None in fitting:
        raise UserError(
            f"--preset {setup.preset} at {setup.size[0]}x{setup.size[1]} does not fit into memory, not even one "
            "picture at a time; give a smaller --preset or --image-size."
        )
    if all(fits == stage.batch for fits, stage in zip(fitting, stages)):
        return measured
    if settings.batch_size:
        raise UserError(
            f"--batch-size {settings.batch_size} does not fit into memory ({measured.free / 1e9:.1f} GB); "
            f"give {min(fitting)}."
        )
    smaller = Setup(setup.preset, setup.factor, setup.size, setup.fit, min(fitting))
    return _measure_once(settings, found, smaller, probes)


def _measure_once(settings, found: Found, setup: Setup, probes: Probes) -> Measured:
    place = probes.new_room()
    sheet = found.write(place, setup.size, setup.fit)
    given = ["--preset", setup.preset, "--precision", settings.precision]
    given += ["--batch-size", str(setup.batch_size)] if setup.batch_size else []
    vae = ["--factor", str(setup.factor), "--out", str(place / "stage1")]
    one = probes.ask(1, {"flags": [str(sheet), *given, *vae], "limit": _LIMIT})
    latents = {"shape": one["shape"], "size": list(setup.size), "classes": found.classes}
    flags = ["--latents", str(place / "latents"), "--vae", str(place / "stage1/vae"), "--out", str(place / "stage2")]
    request = {"flags": [*flags, *given], "latents": latents, "sheet": str(sheet), "limit": _LIMIT}
    two = probes.ask(2, request)
    pixels = found.some.channels * prod(setup.size)
    lines = (place / "manifest.jsonl").stat().st_size / len(found.some.records)
    source = Source(found.train, found.val, pixels, lines)
    clocks = [_costs(found, one, two, clock, setup.preset, probes.start) for clock in (0, 1)]
    return Measured(setup, source, *clocks, free=min(one["free"], two["free"]))


def _costs(found: Found, one: dict, two: dict, clock: int, preset: str, start: Cost) -> Costs:
    """Seconds by one of the two clocks, out of what the probes told."""
    statistics = one["statistics"] * one["encode"][clock]
    vae_look = (min(found.val, 512) + min(found.train, 128)) * one["look"][clock] + one["preview"][clock]
    usual = [stage_settings(number, preset).LENGTHS[preset] for number in (1, 2)]
    return Costs(
        start=start[clock],
        survey=3 * found.survey[clock],  # by `data`, `train-vae` and `encode`
        check=found.check[clock],
        read=one["read"][clock],
        encode=one["encode"][clock],
        look=one["look"][clock],
        draw=two["draw"][clock],
        draw_exact=two["draw_exact"][clock],
        features=two["features"][clock],
        latent_values=prod(one["shape"]),
        drawn=two["drawn"],
        encode_peak=one["encode_peak"],
        one=_stage(one, clock, usual[0], vae_look, vae_look, max(0.0, one["export"][clock] - statistics)),
        two=_stage(two, clock, usual[1], two["look"][clock], two["first_look"][clock], two["export"][clock]),
    )


def _stage(told: dict, clock: int, usual: int, look: float, first_look: float, export: float) -> StageCost:
    seconds = {name: told[name][clock] for name in ("setup", "step", "checkpoint")}
    byte = {name: told.get(name, 0) for name in ("checkpoint_bytes", "model_bytes", "snapshot_bytes", "peak", "each")}
    return StageCost(told["examples"], usual, look=look, first_look=first_look, export=export, **seconds, **byte)
