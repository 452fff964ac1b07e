"""How a stage's loop spends its time: steps, checkpoints, validations, and pictures that are read as they come."""

import math
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class StageCost:
    """Seconds and bytes of a stage: `look` is a validation with its sheet, `each` the memory of one example."""

    batch: int
    usual: int  # steps of the preset
    setup: float
    step: float
    look: float
    first_look: float
    checkpoint: float
    export: float
    checkpoint_bytes: int = 0
    model_bytes: int = 0
    snapshot_bytes: int = 0
    peak: int = 0
    each: int = 0
    validations: int = 8
    keep: int = 2
    checkpoint_every: int = 500


def training(stage: StageCost, budget: float, read: float, most: int | None, steps: int | None) -> tuple[int, float]:
    """Steps and seconds of a stage's loop without what ends it; `most` pictures cost `read` each, once.

    It validates whenever another eighth of the time has gone by; one that takes longer is followed by the next at once.
    """
    pace = _Pace(stage, read, math.inf if most is None else most)
    clock, count, looks, reached = 0.0, 0.0, 0, 0
    eighth = budget / stage.validations
    while clock < budget:
        taken = max(1.0, pace.steps((reached + 1) * eighth - clock, count))
        clock += pace.seconds(taken, count)
        count += taken
        reached = math.floor(clock / eighth + 1e-9)
        if reached < stage.validations:
            clock += stage.look if looks else stage.first_look
            looks += 1
    if steps is None:
        return max(1, int(count)), clock
    return steps, pace.seconds(steps, 0.0) + looks * stage.look + (stage.first_look - stage.look if looks else 0.0)


class _Pace(NamedTuple):
    """How fast a loop goes while pictures must still be read, `most` of them, and afterwards."""

    stage: StageCost
    read: float
    most: float

    @property
    def step(self) -> float:
        """Seconds of a step whose pictures are there, with its share of a checkpoint."""
        return self.stage.step + self.stage.checkpoint / self.stage.checkpoint_every

    def steps(self, seconds: float, done: float) -> float:
        """How many are taken in this time after so many."""
        slow = self.step + self.stage.batch * self.read
        seconds = max(seconds, 0.0)
        first = min(seconds, self._unread(done) * slow)
        return first / slow + (seconds - first) / self.step

    def seconds(self, steps: float, done: float) -> float:
        """What so many take after so many."""
        return steps * self.step + min(steps, self._unread(done)) * self.stage.batch * self.read

    def _unread(self, done: float) -> float:
        """Steps until every picture is there."""
        return max(self.most / self.stage.batch - done, 0.0)
