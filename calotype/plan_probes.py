"""The processes that probe the stages, none of which outlives a plan."""

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from calotype.doctor_processes import kill_group
from calotype.errors import UserError, one_line
from calotype.planning import Cost

_PROBES = {1: "calotype.stage1_vae.probe", 2: "calotype.stage2_diffusion.probe"}


class Probes:
    """The probes' processes; they start at once, so that they import while the pictures are looked at."""

    def __init__(self, room: Path):
        self.room, self.rooms, self.start = room, 0, Cost(0.0, 0.0)
        self.began = time.perf_counter()
        self.logs = {number: room / f"probe{number}.log" for number in _PROBES}
        self.processes = {number: self._begin(number) for number in _PROBES}
        self.ready: set[int] = set()

    def _begin(self, number: int) -> subprocess.Popen:
        with self.logs[number].open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", _PROBES[number]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.room,
                start_new_session=True,  # a terminal's Ctrl-C comes to us alone
            )

    def new_room(self) -> Path:
        """An empty folder for one set-up."""
        self.rooms += 1
        place = self.room / str(self.rooms)
        place.mkdir()
        return place

    def ask(self, number: int, request: dict[str, Any]) -> dict[str, Any]:
        """What the probe of a stage answers; raises UserError where it cannot, or has died."""
        self._wait_for_both()
        process = self.processes[number]
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        answer = self._line(number)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _wait_for_both(self) -> None:
        """Until both have imported what they need: what they measure must not be disturbed."""
        for number in _PROBES:
            if number not in self.ready:
                told = self._line(number)
                self.ready.add(number)
                if number == 1:  # a run imports all of it once
                    self.start = Cost(time.perf_counter() - self.began, told["start_cpu"])

    def _line(self, number: int) -> dict[str, Any]:
        line = self.processes[number].stdout.readline()
        if line:
            return json.loads(line)
        code = self.processes[number].wait()
        last = self.logs[number].read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        how = "memory may have run out" if code == -signal.SIGKILL else one_line(last[0])
        raise UserError(f"SOURCE: stage {number} could not be tried (exit code {code}: {how}); run `calotype doctor`.")

    def end(self) -> None:
        """End what still runs, and wait for it."""
        for process in self.processes.values():
            if process.poll() is None:
                kill_group(process)
            process.wait()
            process.stdin.close()
            process.stdout.close()
