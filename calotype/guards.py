"""Guards of a run: steps that were left out, and a loss that jumps; what is said of them, and when the run goes back.

They read figures where the loop reads them anyway, once a line of metrics.jsonl, and keep a device from nothing.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from calotype.errors import UserError
from calotype.faults import locate
from calotype.stage import Stage

_MOST_SKIPPED = 2  # steps in a row that may be left out before the run goes back
_MOST_HALVINGS = 4  # of the learning rate, before the run gives up

_MEMORY, _LONG_MEMORY = 16, 64  # steps over which the usual loss, and its deviation from it, are averaged
_UNIT = 0.01  # of the first loss: where the logarithm turns into a straight line
_YOUNG = 50  # steps before anything is called unusual
_HIGH, _LOW = 6.0, 3.0  # deviations above the usual loss at which it is a jump, and below which it is over
_LEAST_DEVIATION = 0.05  # of the logarithm: a loss that hardly scatters may move that much
_SURE = 2  # high steps among the last _RECENT that make a jump: one alone is an odd batch
_RECENT = 5
_LASTING = 100  # steps after which a jump does not pass by itself
_NEW_LEVEL = 300  # steps after which a higher loss is the usual one


class Window(NamedTuple):
    """What the steps since the last reading said, as means over the processes."""

    first: int  # the number of the first of them
    good: list[bool]  # which were taken
    losses: list[tuple[int, float]]  # step and loss of those that have one
    means: dict[str, float]

    @property
    def finite(self) -> bool:
        """Whether all figures of the steps that were taken are numbers."""
        return all(map(math.isfinite, self.means.values()))


def read(steps: list[dict[str, Tensor]], first: int, accelerator: Accelerator) -> Window:
    """Wait for the device once and read the figures of these steps; every process gets the same."""
    good = torch.stack([values["gradient_norm"] for values in steps]).isfinite().tolist()
    taken = {first + i: values for i, (values, was) in enumerate(zip(steps, good)) if was}
    names = dict.fromkeys(name for values in taken.values() for name in values)
    columns = {name: torch.stack([v[name] for v in taken.values() if name in v]).float() for name in names}
    columns = accelerator.reduce(columns, "mean")
    numbers = [step for step, values in taken.items() if "loss" in values]
    losses = list(zip(numbers, columns["loss"].tolist())) if numbers else []
    return Window(first, good, losses, {f"{name}[train]": column.mean().item() for name, column in columns.items()})


class Back(NamedTuple):
    """A call to go back: to a checkpoint not after step `up_to`, if there is one; `needed` if there must be."""

    reason: str
    besides: str
    up_to: int | None = None
    needed: bool = True


class Guard:
    """What a run remembers of its mishaps; `state` is JSON, so that a resumed run decides as an uninterrupted one."""

    def __init__(self, stage: Stage, checkpoints: Path):
        self.stage, self.checkpoints = stage, checkpoints
        self.state: dict[str, Any] = {"lr_factor": 1.0, "in_a_row": 0, "skipped": 0, "spikes": 0}
        self.jumps = Jumps()
        self.state["jumps"] = self.jumps.state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        jumps = self.jumps.state | state.get("jumps", {})
        self.state.update(state)
        self.jumps.state = self.state["jumps"] = jumps

    @property
    def counts(self) -> dict[str, int]:
        """Steps that were left out and jumps of the loss, over the whole run."""
        return {name: self.state[name] for name in ("skipped", "spikes")}

    def left_out(self, window: Window) -> tuple[list[str], Back | None]:
        """The sentences about steps that were left out; after three in a row the call to go back at half the rate."""
        bad = [window.first + i for i, taken in enumerate(window.good) if not taken]
        self.state["skipped"] += len(bad)
        sentences = [f"{locate(self.stage, bad[0])}; the step was left out."] if bad and not self.in_a_row else []
        for taken in window.good:
            self.state["in_a_row"] = 0 if taken else self.in_a_row + 1
            if self.in_a_row > _MOST_SKIPPED:
                return sentences, self._slow_down(window)
        return sentences, None

    @property
    def in_a_row(self) -> int:
        """Steps up to now that were left out one after the other."""
        return self.state["in_a_row"]

    def _slow_down(self, window: Window) -> Back:
        self.state["in_a_row"] = 0
        if not self._halve():
            raise UserError(
                f"{self.stage.name}: the gradient is not finite at step {window.first + len(window.good)}, again and "
                f"again; try a lower --lr, or --precision fp32. The last good state is in {self.checkpoints}."
            )
        return Back("The gradient was not finite three times in a row", ", with half the learning rate")

    def _halve(self) -> bool:
        """Halve the learning rate of the rest of the run, at most four times."""
        if self.state["lr_factor"] <= 0.5**_MOST_HALVINGS:
            return False
        self.state["lr_factor"] /= 2
        return True

    def jumped(self, window: Window) -> list[str]:
        """A sentence for each jump of the loss that begins in this window."""
        found = [sentence for step, loss in window.losses if (sentence := self.jumps.see(step, loss))]
        self.state["spikes"] += len(found)
        return found

    def stays_high(self, step: int) -> Back | None:
        """The call to go back where a jump did not pass by itself; asked at fixed steps, whenever a run is resumed."""
        since = self.jumps.state["since"]
        if since is None or step - since < _LASTING or self.jumps.state["told"] or not self._halve():
            return None
        self.jumps.state["told"] = True
        reason = f"The loss has been high for {step - since} steps"
        return Back(reason, ", with half the learning rate", up_to=since, needed=False)


class Jumps:
    """Finds jumps of a loss by its deviation from a moving average, in units of the moving deviation (a z-score).

    Both are taken of asinh(loss / a hundredth of the first loss): the logarithm but near zero, through which a bound in
    nats may go, so that a batch that is odd by some factor counts little. What is far out enters
    the averages only up to three deviations, and not at all while the loss is high.
    """

    def __init__(self):
        self.state: dict[str, Any] = {"unit": None, "seen": 0, "mean": 0.0, "variance": 0.0}
        self.state |= {"recent": [], "since": None, "told": False}

    def see(self, step: int, loss: float) -> str | None:
        """Take in the loss of a step; returns a sentence if a jump has begun."""
        state = self.state
        if state["unit"] is None:
            state["unit"] = max(_UNIT * abs(loss), 1e-12)
        value = math.asinh(loss / state["unit"])
        z = self.deviations(value)
        state["recent"] = [*state["recent"], [step, z]][-_RECENT:]
        if state["since"] is not None:
            return self._while_high(step)
        high = [number for number, away in state["recent"] if away > _HIGH]
        if len(high) >= _SURE and z > _HIGH:
            state |= {"since": high[0], "told": False}
            usual = math.sinh(state["mean"]) * state["unit"]
            return f"The loss jumped at step {high[0]}: {loss:.4g}, where {usual:.4g} was usual."
        if z <= _HIGH:
            self._learn(value)
        return None

    def deviations(self, value: float) -> float:
        """How many deviations a value lies above the mean; 0 while little has been seen."""
        if self.state["seen"] < _YOUNG:
            return 0.0
        least = _LEAST_DEVIATION * min(1.0, abs(self.state["mean"]))
        return (value - self.state["mean"]) / max(self.state["variance"] ** 0.5, least, 1e-12)

    def _while_high(self, step: int) -> None:
        """The jump is over when the loss is near the usual one again; or when high is what it usually is."""
        low = [away < _LOW for _, away in self.state["recent"]]
        if all(low) and len(low) == _RECENT:
            self.state["since"] = None
        elif step - self.state["since"] >= _NEW_LEVEL:
            self.state |= {"since": None, "seen": 0, "recent": []}

    def _learn(self, value: float) -> None:
        state = self.state
        state["seen"] += 1
        fast, slow = (max(1 / state["seen"], 1 / memory) for memory in (_MEMORY, _LONG_MEMORY))
        away = value - state["mean"]
        if state["seen"] > _YOUNG:
            most = 3 * max(state["variance"] ** 0.5, 1e-12)
            away = max(-most, min(most, away))
        state["mean"] += fast * away
        if state["seen"] > 1:
            state["variance"] += slow * (away**2 - state["variance"])
