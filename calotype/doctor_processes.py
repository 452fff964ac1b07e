"""Processes that `calotype doctor` starts, none of which outlives it."""

import os
import signal
import subprocess
import threading
from contextlib import nullcontext, suppress
from pathlib import Path


class Processes:
    """Starts processes in groups of their own; `end` kills all that still run, with their children."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen] = []
        self.closed = False
        self.lock = threading.Lock()

    def start(self, words: list[str], log: Path | None = None) -> subprocess.Popen:
        """Start a process that prints into `log`, or into a pipe; RuntimeError where the doctor is already leaving."""
        with self.lock, log.open("ab") if log else nullcontext(subprocess.PIPE) as stream:
            if self.closed:
                raise RuntimeError("stopped on the way")
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C comes to us alone
            )
            self.started.append(process)
        return process

    def end(self) -> None:
        """Kill what still runs, and wait for it."""
        with self.lock:
            self.closed = True
        for process in self.started:
            if process.poll() is None:
                kill_group(process)
            process.wait()


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process that leads a session of its own, with all that it started."""
    if os.name == "nt":
        process.kill()
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
