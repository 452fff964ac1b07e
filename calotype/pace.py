"""How far a run is, by its steps or by the clock, and when it is told to stop."""

import math
import signal
import threading
import time
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from calotype.config import TrainSettings


class Pace:
    """How far a run is: by its steps, by the clock, or by whichever is further."""

    def __init__(self, settings: TrainSettings, step: int, spent: float, accelerator: Accelerator):
        self.steps, self.minutes, self.spent = settings.length, settings.max_minutes, spent
        self.accelerator = accelerator
        self.began = time.monotonic()
        self.marks = [(step, self.began)]  # the last readings

    @property
    def seconds(self) -> float:
        """Seconds of training so far, earlier sessions included."""
        return self.spent + time.monotonic() - self.began

    def progress(self, step: int) -> float:
        """The share of the run that lies behind, 1 at its end; the same in every process."""
        by_steps = 1.0 if self.steps == 0 else step / self.steps if self.steps else 0.0
        if self.minutes is None:
            return by_steps
        shared = [max(by_steps, self.seconds / (60 * self.minutes))]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(shared)
        return min(shared[0], 1.0)

    def rate(self, step: int) -> float:
        """Steps a second over the last few readings."""
        self.marks = [*self.marks[-20:], (step, time.monotonic())]
        (first, then), (last, now) = self.marks[0], self.marks[-1]
        return (last - first) / (now - then) if now > then else 0.0

    def left(self, step: int) -> tuple[float, float]:
        """Seconds to the end, and the share that lies behind, by this process's own clock."""
        by_clock = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        progress = max(by_clock, step / self.steps if self.steps else 0.0)
        return self.seconds * (1 - progress) / max(progress, 1e-6), min(progress, 1.0)


class Interruption:
    """Notes signals, so that a step can end and be saved: SIGINT and SIGTERM to stop, SIGUSR1 to go on afterwards.

    A second Ctrl-C stops at once.
    """

    def __init__(self):
        self.received: int | None = None
        self.since = 0.0
        self.asked = self.answered = 0  # how often SIGUSR1 came, and up to which of them a step has looked
        self.earlier: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM (where another process was told, 143 too)."""
        return 128 + (self.received or signal.SIGTERM)

    def look(self) -> tuple[bool, bool]:
        """Whether a signal came that asks to stop, and whether one came since the last look that asks to save."""
        asked, before = self.asked, self.answered
        self.answered = asked
        return self.received is not None, asked > before

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for name, handler in (("SIGINT", self._note), ("SIGTERM", self._note), ("SIGUSR1", self._note_save)):
                if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                    self.earlier[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        """A launcher may repeat SIGTERM, and hand on what we got already; only a later Ctrl-C means at once."""
        if self.received is None:
            self.received, self.since = number, time.monotonic()
            print("\nStopping after this step; Ctrl-C once more stops at once.", flush=True)
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt

    def _note_save(self, number: int, frame) -> None:
        self.asked += 1
        print("\nSaving after this step.", flush=True)


def learning_rate_factor(settings: TrainSettings, step: int, progress: float) -> float:
    """Linear warm-up over the first steps times a half cosine over the run, or 1; in (0, 1]."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    return warmup * (0.5 * (1 + math.cos(math.pi * progress)) if settings.lr_schedule == "cosine" else 1.0)
