"""Does a run take what `calotype plan` said it would? A plan, then the run that it prints, then both beside each other.

    python -m benchmarks.plan_check
    python -m benchmarks.plan_check "FOLDER --hours 0.1 --image-size 32 --fit pad"

Each argument is the words of one plan. The clock includes whatever else the machine does; the processor's time of the
same number of steps does not, and steps are compared at the share of the processor that the run got.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import Figure, conclude
from calotype import cli, planning
from calotype.plan import Plan, make
from calotype.probing import size_of

CASES = ("shapes --hours 0.06 --preset tiny", "shapes --hours 0.06 --preset tiny --image-size 16")
WITHIN = 0.2  # of what was found
_ROOMY = 0.3  # for memory: pages of files that are mapped come and go


class Outcome(NamedTuple):
    """What a run really took."""

    seconds: float
    cpu: float
    memory: int
    disk: int
    steps: tuple[int, int]
    commands: dict[str, float]  # seconds of each


def main() -> int:
    """Print a table; 1 if a figure misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, help="words of `calotype plan`, one argument a plan")
    args = parser.parse_args()
    figures, more = [], {}
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            plan = make(cli.settings_of(["plan", *shlex.split(case), "--out", f"{folder}/run"]))
            outcome = run(plan.command, Path(folder) / "run")
        figures += compared(case, plan, outcome)
        more[case] = as_json(plan, outcome)
    return conclude("plan_check", figures, {"cases": " | ".join(args.cases)}, {"runs": more})


def run(command: list[str], out: Path) -> Outcome:
    """Let the command of a plan run to its end."""
    log = out.parent / "log"
    began = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=stream, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    if status:
        raise SystemExit(f"{shlex.join(command)} ended with {status}:\n{log.read_text()[-2000:]}")
    steps = tuple(steps_of(out / folder) for folder in ("stage1_vae", "stage2_diffusion"))
    kibibytes = used.ru_maxrss if sys.platform == "linux" else used.ru_maxrss // 1024
    told = json.loads((out / "run.json").read_text())["commands"]
    commands = {entry["name"]: entry["seconds"] for entry in told}
    return Outcome(seconds, used.ru_utime + used.ru_stime, 1024 * kibibytes, size_of(out), steps, commands)


def steps_of(stage: Path) -> int:
    """The number of its newest checkpoint."""
    return max(int(folder.name.partition("-")[2]) for folder in (stage / "checkpoints").iterdir())


def compared(case: str, plan: Plan, outcome: Outcome) -> list[Figure]:
    """How far off the prediction is, in shares of what was found."""
    source, cpu, minutes = plan.measured.source, plan.measured.cpu, plan.prediction.minutes
    share = outcome.cpu / outcome.seconds
    same_work = planning.predict(source, cpu, minutes, outcome.steps)
    at_share = planning.predict(source, cpu, minutes * share)
    stages = [at_share.steps(f"stage {number}") for number in (1, 2)]
    return [
        off(f"time, {case}", plan.prediction.seconds, outcome.seconds, "s by the clock"),
        off("  processor, same steps", same_work.seconds, outcome.cpu, "s of the processor"),
        off("  steps of stage 1", stages[0], outcome.steps[0], f"steps at {share:.0%} of a core"),
        off("  steps of stage 2", stages[1], outcome.steps[1], f"steps at {share:.0%} of a core"),
        off("  disk", plan.prediction.disk / 1e6, outcome.disk / 1e6, "MB"),
        off("  memory", plan.prediction.memory / 1e6, outcome.memory / 1e6, "MB", _ROOMY),
    ]


def off(name: str, predicted: float, found: float, unit: str, goal: float = WITHIN) -> Figure:
    """|predicted / found - 1|."""
    return Figure(name, abs(predicted / found - 1), "off", goal, True, how=f"{predicted:.5g} for {found:.5g} {unit}")


def as_json(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """All numbers of a case."""
    parts = [part._asdict() for part in plan.prediction.parts]
    return {"command": shlex.join(plan.command), "predicted": parts, "found": outcome._asdict()}


if __name__ == "__main__":
    sys.exit(main())
