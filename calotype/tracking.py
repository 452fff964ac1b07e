"""What a run tells: one progress line, metrics.jsonl, accelerate's trackers."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.progress import BarColumn, Progress, TextColumn

from calotype.disk import sync, write_text
from calotype.errors import is_disk_full

_TEXT_WIDTH = 85  # columns that the words of the line may take
_PLAIN_EVERY = 15.0  # seconds between lines where the output is no terminal


class Journal:
    """metrics.jsonl of one stage; lines beyond the step at which a run goes on are dropped."""

    def __init__(self, file: Path, step: int, accelerator: Accelerator):
        self.file, self.accelerator, self.waiting = file, accelerator, ""
        if accelerator.is_main_process and file.exists():
            kept = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
            write_text(file, "".join(line + "\n" for line in kept))

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """Append one line, and tell the trackers."""
        self._append({"step": step, "seconds": round(seconds, 3), **values})
        self.accelerator.log(values, step=step)

    def say(self, step: int, seconds: float, sentence: str) -> None:
        """Append a sentence for the report."""
        self._append({"step": step, "seconds": round(seconds, 3), "said": sentence})

    def to_disk(self) -> None:
        """Bring what was appended to the disk, before a checkpoint counts on it."""
        if self.accelerator.is_main_process and self.file.exists():
            sync(self.file)
            sync(self.file.parent)

    def _append(self, entry: dict[str, Any]) -> None:
        """One line more; what a full disk does not take is kept for later, so that the run goes on."""
        if not self.accelerator.is_main_process:
            return
        self.waiting += json.dumps(entry) + "\n"
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with self.file.open("a") as stream:
                stream.write(self.waiting)
            self.waiting = ""
        except OSError as error:
            if not is_disk_full(error):
                raise
            if self.file.exists():
                os.truncate(self.file, size)  # no half lines


class ProgressLine:
    """Step, rate, time left, loss and the last validation on one line; plain lines where there is no terminal."""

    def __init__(self, name: str, enabled: bool):
        self.name, self.enabled = name, enabled
        self.terminal = sys.stdout.isatty()
        text = TextColumn("{task.description}  {task.fields[text]}", markup=False)
        room = shutil.get_terminal_size().columns - _TEXT_WIDTH
        self.bar = Progress(*([BarColumn(min(room, 30))] if room > 4 else []), text)
        self.task = self.bar.add_task(name, total=1.0, text="")
        self.last = 0.0
        if enabled and self.terminal:
            self.bar.start()

    def show(self, progress: float, step: int, rate: float, left: float, values: dict[str, float]) -> None:
        """Draw the line; `progress` in [0, 1], `rate` in examples a second, `left` in seconds."""
        figures = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        text = f"step {step}  {rate:,.0f} img/s  ETA {int(left) // 60}:{int(left) % 60:02d}  {figures}"
        if self.terminal:
            self.bar.update(self.task, completed=progress, text=text)
        elif self.enabled and time.monotonic() - self.last > _PLAIN_EVERY:
            self.last = time.monotonic()
            print(f"{self.name}  {text}", flush=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.enabled and self.terminal:
            self.bar.stop()


def _step_of(line: str) -> float:
    """The step of a line; a torn one counts as the far future."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
