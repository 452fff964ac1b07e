"""The planner: its arithmetic with given measurements, the command it prints, and one real plan that leaves nothing."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from calotype import cli, plan, plan_pace, plan_probes, planning, run
from calotype.errors import UserError
from calotype.plan_measure import Measured, Setup
from calotype.planning import Costs, Source, StageCost
from calotype.settings import PlanSettings

SOURCE = Source(train=57_000, val=3_000, pixels=32 * 32)
ONE = StageCost(
    batch=32, usual=1200, setup=0.3, step=0.08, look=1.5, first_look=1.5, checkpoint=0.05, export=0.1,
    checkpoint_bytes=3_000_000, model_bytes=950_000, peak=900_000_000, each=2_000_000,
)  # fmt: skip
TWO = StageCost(
    batch=64, usual=1800, setup=0.5, step=0.12, look=4.0, first_look=5.0, checkpoint=0.2, export=0.2,
    checkpoint_bytes=55_000_000, model_bytes=11_000_000, snapshot_bytes=11_000_000, peak=1_000_000_000, each=1_000_000,
)  # fmt: skip
TINY = Costs(
    start=6.0, survey=0.5, check=4e-4, read=2e-4, encode=5e-4, look=1e-3, draw=0.03, draw_exact=0.05, features=0.05,
    latent_values=256, drawn=512, encode_peak=1_100_000_000, one=ONE, two=TWO,
)  # fmt: skip


def slower(costs, factor, longer):
    """Costs of a larger preset: steps that take `factor` times as long, and `longer` times as many of them."""
    one, two = (replace(s, step=factor * s.step, look=factor * s.look, usual=longer * s.usual) for s in (ONE, TWO))
    return replace(costs, one=one, two=two, draw=factor * costs.draw, draw_exact=factor * costs.draw_exact)


COSTS = {"tiny": TINY, "small": slower(TINY, 12, 20), "base": slower(TINY, 100, 100)}
SOURCES = dict.fromkeys(COSTS, SOURCE)
HOURS = [0.1, 0.15, 0.3, 0.7, 1, 2, 5, 10, 30, 100, 1000, 10_000]


def test_more_hours_never_give_less():
    presets, minutes = [], []
    for hours in HOURS:
        presets.append(list(COSTS).index(planning.choose(SOURCES, COSTS, hours)))
        minutes.append(planning.plan_for(SOURCE, TINY, hours).minutes)
    assert presets == sorted(presets) and set(presets) == {0, 1, 2}
    assert minutes == sorted(minutes)
    for costs in COSTS.values():
        plans = [planning.plan_for(SOURCE, costs, hours) for hours in HOURS]
        for name in ("stage 1", "stage 2"):
            steps = [found.steps(name) for found in plans]
            assert steps == sorted(steps) and steps[0] < steps[-1]


@pytest.mark.parametrize("hours", HOURS)
def test_the_whole_run_ends_within_the_hours_and_uses_them(hours):
    found = planning.plan_for(SOURCE, TINY, hours)
    assert 0.9 * 3600 * hours < found.seconds <= 3600 * hours * (1 + 1e-9)
    assert sum(part.seconds for part in found.parts) == found.seconds


def test_a_preset_is_chosen_from_the_hours_on_that_are_named():
    least = planning.least_hours(SOURCE, COSTS["small"], planning.ENOUGH)
    assert planning.choose(SOURCES, COSTS, 1.01 * least) == "small"
    assert planning.choose(SOURCES, COSTS, 0.99 * least) == "tiny"


@pytest.mark.parametrize("minutes", [2, 30, 600])
@pytest.mark.parametrize("spent", [0, 45, 1500])
def test_a_stage_gets_the_minutes_that_run_gives_it(minutes, spent):
    settings = cli.settings_of(["run", "shapes", "--max-minutes", str(minutes), "--out", "unused"])
    for name, until in (("train-vae", run.STAGE1_UNTIL), ("train-diffusion", run.STAGE2_UNTIL)):
        stage = cli.settings_of(run.command(name, settings, spent))
        assert planning._budget(until, minutes, spent) == pytest.approx(60 * stage.max_minutes, abs=0.4)


def walk(stage, budget, read, pictures):
    """Steps of the loop of a stage with a clock of its own, as calotype/loop.py goes through it."""
    clock, steps, progress, looks = 0.0, 0, 0.0, 0
    while progress < 1:
        clock += stage.step + read * sum(i < pictures for i in range(steps * stage.batch, (steps + 1) * stage.batch))
        steps += 1
        before, progress = progress, min(1.0, clock / budget)
        if int(8 * progress) > int(8 * before) and progress < 1:
            clock += stage.first_look if looks == 0 else stage.look
            looks += 1
        if steps % stage.checkpoint_every == 0:
            clock += stage.checkpoint
    return steps


@pytest.mark.parametrize("budget", [25, 70, 300, 3000])
@pytest.mark.parametrize("read, pictures", [(0, 0), (2e-3, 12_000), (1e-3, 10**9)])
@pytest.mark.parametrize(
    "stage", [ONE, TWO, replace(TWO, look=30.0, first_look=30.0)], ids=["one", "two", "slow looks"]
)
def test_steps_are_those_of_a_loop_that_is_walked_through(stage, budget, read, pictures):
    found, _ = plan_pace.training(stage, budget, read, pictures or None, None)
    assert found == pytest.approx(walk(stage, budget, read, pictures), rel=0.06, abs=3)


@pytest.mark.parametrize("free", [10**9, 4 * 10**9, 20 * 10**9, 64 * 10**9])
def test_a_batch_leaves_memory_free(free):
    stage = replace(TWO, batch=512, peak=30 * 10**9, each=50_000_000)
    batch = planning.batch_that_fits(stage, free, besides=0)
    fixed = stage.peak - 512 * stage.each
    if fixed > 0.8 * free:
        assert batch is None
    else:
        assert fixed + batch * stage.each <= free
        assert batch == 512 or fixed + 2 * batch * stage.each > 0.8 * free  # and no smaller than need be


@pytest.mark.parametrize(
    "usual, own, multiple, side",
    [
        (32, None, 8, 32),
        (32, 28, 8, 32),
        (32, 32, 8, 32),
        (32, 500, 8, 32),
        (128, 100, 32, 96),
        (64, 5, 8, 8),
        (64, 17, 8, 16),
    ],
)
def test_pictures_keep_their_pixels(usual, own, multiple, side):
    assert planning.side_for(usual, own, multiple) == side


@pytest.mark.parametrize(
    "usual, side, factor", [(8, 256, 8), (8, 32, 4), (4, 32, 4), (4, 16, 2), (4, 4, 2), (8, 64, 8), (4, 28, 4)]
)
def test_latents_keep_six_elements_a_side(usual, side, factor):
    assert planning.factor_for(usual, side) == factor


def planned(settings, setup, hours=2.0):
    measured = Measured(setup, SOURCE, TINY, TINY, free=8 * 10**9)
    prediction = planning.plan_for(SOURCE, TINY, hours)
    words = plan.command(settings, setup, prediction.minutes)
    return plan.Plan(measured, prediction, words, {setup.preset: measured}, "All is quiet.")


@pytest.mark.parametrize(
    "setup",
    [
        Setup("tiny", 4, (32, 32), None, None),
        Setup("small", 2, (28, 32), "pad", 48),
        Setup("base", 8, (128, 128), "crop", None),
    ],
)
def test_the_command_can_be_typed_and_means_the_plan(setup, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = PlanSettings(source="shapes", hours=2.0, val="0.1", precision="fp32")
    words = planned(settings, setup).command
    assert words[:2] == ["calotype", "run"]
    parsed = cli.settings_of(shlex.split(shlex.join(words))[1:])
    one, two = (cli.settings_of(run.command(name, parsed, 0.0)) for name in ("train-vae", "train-diffusion"))
    assert (parsed.preset, one.factor, parsed.fit, parsed.val, parsed.precision) == (
        setup.preset, setup.factor, setup.fit, "0.1", "fp32",
    )  # fmt: skip
    assert parsed.max_minutes == pytest.approx(planned(settings, setup).prediction.minutes, rel=1e-3)
    assert setup.batch_size is None or one.batch_size == two.batch_size == setup.batch_size
    data = cli.settings_of(run.data_command(parsed))
    assert data.image_size in ("x".join(map(str, setup.size)), str(setup.size[0]))
    Path("runs/shapes").mkdir(parents=True)
    assert planned(settings, setup).command[-1] == "runs/shapes-2"


@pytest.mark.parametrize(
    "hours, expected", [(0.06, "too short for more than a try"), (0.3, "usual length"), (20, "times")]
)
def test_what_to_expect_is_said_in_words(hours, expected):
    settings = PlanSettings(source="shapes", hours=hours)
    console = Console(width=110, highlight=False)
    with console.capture() as captured:
        plan.show(console, settings, planned(settings, Setup("tiny", 4, (32, 32), None, None), hours), 20.0)
    text = captured.get()
    assert expected in text and all(len(line) <= 110 for line in text.splitlines()[2:10])
    assert "stage 1" in text and "all of it" in text


@pytest.mark.parametrize("load, expected", [(0.1, "makes a run slower"), (1.5, "is busy (a load of 3.0 on 2 cores)")])
def test_a_machine_that_does_other_work_is_told_of(monkeypatch, load, expected):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("psutil.getloadavg", lambda: (2 * load, 0.0, 0.0))
    assert expected in plan.load_now()


def test_hours_that_are_too_short_are_refused_with_enough_of_them():
    settings = PlanSettings(source="shapes", hours=0.01)
    found = planned(settings, Setup("tiny", 4, (32, 32), None, None), 0.01)
    with pytest.raises(UserError, match="--hours 0.01 is too short.* give ") as refusal:
        plan._refuse_too_short(settings, found.measured, found.prediction, "All is quiet.")
    enough = float(str(refusal.value).split(" give ")[1].split()[0])
    found = planned(settings, found.measured.setup, enough)
    plan._refuse_too_short(
        PlanSettings(source="shapes", hours=enough), found.measured, found.prediction, "All is quiet."
    )
    assert planning.completeness(TINY, found.prediction) >= 0.9 * planning.ENOUGH


def test_a_probe_that_dies_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_probes, "_PROBES", {1: "calotype.no_such_probe", 2: "calotype.no_such_probe"})
    probes = plan_probes.Probes(tmp_path)
    try:
        with pytest.raises(UserError, match=r"stage 1 could not be tried \(exit code 1: .*no_such_probe.*doctor"):
            probes.ask(1, {})
    finally:
        probes.end()


@pytest.mark.parametrize(
    "words, expected",
    [
        (["nowhere", "--hours", "1"], "SOURCE nowhere"),
        (["nothing:known", "--hours", "1"], "SOURCE nothing:known is not known"),
        (["shapes", "--hours", "0"], "--hours 0"),
        (["shapes"], "--hours"),
    ],
)
def test_refusals_are_one_line(words, expected, capsys):
    assert cli.main(["plan", *words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("calotype: ") and message.count("\n") == 1 and expected in message


def test_a_real_plan_leaves_nothing_behind(pictures, tmp_path, monkeypatch, capsys):
    room, here = tmp_path / "temporary", tmp_path / "here"
    room.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    before = sorted(pictures.rglob("*"))
    words = ["--hours", "0.5", "--preset", "tiny", "--image-size", "8", "--batch-size", "4"]
    assert cli.main(["plan", str(pictures), *words]) == 0
    text = capsys.readouterr().out
    assert list(room.iterdir()) == list(here.iterdir()) == [] and sorted(pictures.rglob("*")) == before
    line = next(line for line in text.splitlines() if line.startswith("calotype run"))
    parsed = cli.settings_of(shlex.split(line)[1:])
    assert (parsed.preset, parsed.image_size, parsed.batch_size) == ("tiny", "8", 4)
    assert 0.8 * 30 < parsed.max_minutes <= 30
    steps = {row.split()[1]: int(row.split()[2].replace(",", "")) for row in text.splitlines() if row[:6] == "stage "}
    assert steps.keys() == {"1", "2"} and min(steps.values()) > 100


def test_ctrl_c_ends_the_probes_and_clears_up(pictures, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    words = [sys.executable, "-m", "calotype", "plan", str(pictures), "--hours", "1"]
    process = subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not list(tmp_path.glob("calotype-plan-*/probe2.log")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, process.stderr.read()
    assert list(tmp_path.iterdir()) == []
