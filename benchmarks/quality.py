"""Quality per minute: how far are samples from held-out pictures after so much training, ours and the usual recipe's?

    python -m benchmarks.quality --run RUN --out DIR
    python -m benchmarks.quality --run RUN --out DIR --minutes 10   # a part; the same line again goes on from there

Both sides share RUN's latents and autoencoder, the preset's network, batch and optimiser, the average of the weights
and the sampler. The usual recipe is noise prediction at uniform times (Ho et al. 2020; Rombach et al. 2022), its
learning rate the best of several in trials of half the time; ours is the preset's, unless --our-lrs asks for the same.
It falls to 0 at the end of a run, so every length is a run of its own. A second is as many steps as an undisturbed core
takes in one, found by turns at the beginning: both sides then do the same work whoever else computes. DIR keeps all
rows, the samples of the main length for others to judge, and the curve as SVG.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

from benchmarks import timing
from benchmarks.curve_svg import write_svg
from benchmarks.figures import Figure, conclude
from benchmarks.objectives import Judge, draw, make_stage, set_learning_rate, write
from calotype.stage2_diffusion.train import DiffusionStage

SIDES = {"ours": [], "usual": ["--objective", "epsilon"]}
SHARES = {"ours": (1, 0.5, 0.25), "usual": (1, 3, 0.25, 2)}  # of the main length; the usual 0.5 is its tuning
LEAD = 3.0  # times our training that the usual recipe should need


class Run(NamedTuple):
    """One training: whose, with which learning rate (None: the preset's), seed and seconds."""

    side: str
    lr: float | None
    seed: int
    seconds: float


class Row(NamedTuple):
    """What one drawing of a run came to: distances of the first `few` and of all n samples."""

    side: str
    lr: float | None
    seed: int
    seconds: float
    steps: int
    guidance: float
    n: int
    few: float
    distance: float
    kernel: float

    @property
    def run(self) -> Run:
        """The training that was drawn from."""
        return Run(*self[:4])


def main() -> int:
    """Tune, train, draw, score; print a table and the JSON; 1 if a figure misses its goal, 3 if there is more to do."""
    args = parsed()
    timing.one_thread()
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    began = time.monotonic()
    while (left := bench.left()) and (not args.minutes or time.monotonic() - began < 60 * args.minutes):
        bench.do(left[0])
    if left:
        print(f"{len(left)} trainings are left; run the same line again.")
        return 3
    return bench.report()


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run whose latents and autoencoder are there")
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl, samples and curve.svg")
    parser.add_argument("--cpu-seconds", type=float, default=120, help="the main length")
    parser.add_argument("--seeds", type=int, default=3, help="of the main length")
    parser.add_argument("--late-seeds", type=int, default=1, help="of the usual recipe at three times that length")
    parser.add_argument("-n", type=int, default=5000, help="samples at the main length and three times that")
    parser.add_argument("--few", type=int, default=1000, help="samples elsewhere; a distance falls with their number")
    parser.add_argument("--steps", type=int, default=15, help="evaluations of the sampler")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 2.0], help="scales beside 1")
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="tried for the usual recipe")
    parser.add_argument("--our-lrs", type=float, nargs="+", default=[], help="tried for ours (default: the preset's)")
    parser.add_argument("--preset", default="tiny", help="of stage 2")
    parser.add_argument("--minutes", type=float, help="begin no other training after so many")
    return parser.parse_args()


class Bench:
    """All runs, those that are done, and what is common to them."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.judge = args, Judge(args.run)
        self.tried = {"ours": args.our_lrs, "usual": args.lrs}
        self.file = args.out / "rows.jsonl"
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.rows = [Row(**json.loads(line)) for line in lines]
        self.pace = self._pace()

    def left(self) -> list[Run]:
        """Trainings that are still to be done, the most telling first; tuning comes before all that depends on it."""
        done = {row.run for row in self.rows}
        tuning = [Run(side, lr, 0, self.args.cpu_seconds / 2) for side in SIDES for lr in self.tried[side]]
        missing = [run for run in tuning if run not in done]
        return missing or [run for run in self._measured() if run not in done]

    def do(self, run: Run) -> None:
        """Train, draw and score; the rows are on disk when this ends."""
        stage, steps = self._stage(run), max(1, round(run.seconds * self.pace))
        batches = stage.batches(0)
        for step in range(steps):
            set_learning_rate(stage, step, step / steps)
            stage.step(next(batches), step)
        main = run.seconds == self.args.cpu_seconds
        rows = [self._row(stage, run, steps, scale) for scale in (1.0, *(self.args.guidance if main else ()))]
        with self.file.open("a") as file:
            file.writelines(json.dumps(row._asdict()) + "\n" for row in rows)
        self.rows += rows

    def report(self) -> int:
        """The table, the curve and the JSON."""
        series = {side: self.curve(side) for side in SIDES}
        write_svg(self.args.out / "curve.svg", series, "seconds of training", "Fréchet distance")
        return conclude("quality", figures(self), vars(self.args), {"rows": [r._asdict() for r in self.rows]})

    def best_rate(self, side: str) -> float | None:
        """The learning rate whose trial came nearest; None for the preset's where none was tried."""
        trials = {lr: self.found(side, 0.5, lr=lr)[0].few for lr in self.tried[side]}
        return min(trials, key=trials.get, default=None)

    def curve(self, side: str) -> list[tuple[float, float]]:
        """Seconds and the distance of few samples at guidance 1, with the first seed, which has all lengths."""
        times = sorted({row.seconds for row in self.rows if row.side == side})
        found = ((s, self.found(side, s / self.args.cpu_seconds)) for s in times)
        return [(seconds, rows[0].few) for seconds, rows in found if rows]

    def found(self, side: str, share: float, guidance: float = 1.0, lr: float | None = None) -> list[Row]:
        """Rows of one length by seed."""
        lr = self.best_rate(side) if lr is None else lr
        wanted = (side, lr, share * self.args.cpu_seconds, guidance)
        rows = [row for row in self.rows if (row.side, row.lr, row.seconds, row.guidance) == wanted]
        return sorted(rows, key=lambda row: row.seed)

    def _measured(self) -> list[Run]:
        """The main length of the first seed, then what shows the lead, then other seeds and the rest of the curve."""
        rates, main = {side: self.best_rate(side) for side in SIDES}, self.args.cpu_seconds
        first = [Run(side, rate, 0, main) for side, rate in rates.items()] + [Run("usual", rates["usual"], 0, 3 * main)]
        seeds = [Run(side, rate, seed, main) for seed in range(1, self.args.seeds) for side, rate in rates.items()]
        rest = [Run(side, rate, 0, share * main) for side, rate in rates.items() for share in SHARES[side]]
        late = [Run("usual", rates["usual"], seed, 3 * main) for seed in range(1, self.args.late_seeds)]
        return list(dict.fromkeys(first + seeds + rest + late))

    def _stage(self, run: Run) -> DiffusionStage:
        words = ["--preset", self.args.preset, *SIDES[run.side]]
        return make_stage(self.args.run, run.seed, words + ([] if run.lr is None else ["--lr", f"{run.lr}"]))

    def _row(self, stage: DiffusionStage, run: Run, steps: int, guidance: float) -> Row:
        long = run.seconds in (self.args.cpu_seconds, 3 * self.args.cpu_seconds)
        count = self.args.n if long and guidance == 1 else self.args.few
        x = draw(stage, guidance, count, self.args.steps, 100_000 * (1 + run.seed))
        if long:
            folder = self.args.out / run.side / f"{run.seconds:g}s" / f"seed{run.seed}" / f"g{guidance:g}"
            write(x, stage.class_names, folder)
        whole, few = (self.judge.score(x, compared) for compared in (count, self.args.few))
        row = Row(*run, steps, guidance, count, few["fid[own]"], whole["fid[own]"], whole["kid[own]"])
        print(json.dumps(row._asdict()), flush=True)
        return row

    def _pace(self) -> float:
        """Steps a second of an undisturbed core, the mean of both sides; kept for later parts."""
        file = self.args.out / "pace.json"
        if not file.is_file():
            stages = {side: self._stage(Run(side, None, 0, 0)) for side in SIDES}
            steps = {side: stepper(stage) for side, stage in stages.items()}
            taken = timing.take_turns(steps, rounds=24, warm_up=4)
            file.write_text(json.dumps({side: 1 / undisturbed(values) for side, values in taken.items()}))
        return mean(json.loads(file.read_text()).values())


def stepper(stage: DiffusionStage):
    """A function that takes the stage's next step."""
    numbered = enumerate(stage.batches(0))

    def step() -> None:
        number, batch = next(numbered)
        stage.step(batch, number)

    return step


def undisturbed(seconds: list[float]) -> float:
    """The time that a tenth of the calls stay below."""
    return torch.tensor(seconds).quantile(0.1).item()


def figures(bench: Bench) -> list[Figure]:
    """Distances of both sides, and how much longer the usual recipe trains to come as near."""
    args, found = bench.args, []
    for side in SIDES:
        rows = bench.found(side, 1)
        scale = best_guidance(bench, side)
        how = f"{args.cpu_seconds:g} s, {len(rows)} seeds, learning rate {rows[0].lr or 'of the preset'}"
        values = [row.distance for row in rows]
        found.append(
            Figure(f"{side}: distance, n={args.n}", mean(values), "", None, True, min(values), max(values), how)
        )
        values = [row.few for row in bench.found(side, 1, scale)]
        how = f"the best of {', '.join(f'{s:g}' for s in (1.0, *args.guidance))}"
        name = f"{side}: at guidance {scale:g}, n={args.few}"
        found.append(Figure(name, mean(values), "", None, True, min(values), max(values), how))
    value, how = lead(bench)
    return [*found, Figure("training that the usual recipe needs to come as near", value, "x", LEAD, how=how)]


def best_guidance(bench: Bench, side: str) -> float:
    """The scale at which the mean distance over the seeds is least."""
    scales = {scale: mean(r.few for r in bench.found(side, 1, scale)) for scale in (1.0, *bench.args.guidance)}
    return min(scales, key=scales.get)


def lead(bench: Bench) -> tuple[float, str]:
    """How many times our main length the usual recipe trains until its curve passes our distance, and in words."""
    args, ours = bench.args, bench.found("ours", 1)[0].few
    seconds, how = caught_up(bench.curve("usual"), ours)
    return seconds / args.cpu_seconds, f"{how}; guidance 1, n={args.few:,}, seed 0; ours is at {ours:.3g}"


def caught_up(curve: list[tuple[float, float]], goal: float) -> tuple[float, str]:
    """When a curve of (seconds, distance) first comes as near as the goal, between its points by straight lines."""
    if curve[0][1] <= goal:
        return curve[0][0], "at most: it is there from its first point on"
    for (before, above), (after, below) in zip(curve, curve[1:]):
        if below <= goal:
            return before + (above - goal) / (above - below) * (after - before), "between two lengths"
    return curve[-1][0], f"at least: at its end it is at {curve[-1][1]:.3g}"


if __name__ == "__main__":
    sys.exit(main())
