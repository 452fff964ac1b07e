"""`calotype doctor`: whether this machine can be trusted with a run, tried out in a minute; a table of passes."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from calotype.doctor_disk import examine_disk
from calotype.doctor_drill import Drill
from calotype.doctor_packages import examine_packages
from calotype.doctor_processes import Processes
from calotype.finding import Finding, examine, in_one_line

_PLAIN_WIDTH = 110  # where the output is no terminal
_LONGEST = 300  # seconds until torch must have been imported
_COLOURS = {"pass": "green", "note": "yellow", "FAIL": "bold red"}
_OTHER_FOLDER = "Give --out a folder in which you may write."


def main(settings) -> int:
    """Examine the machine and print the table; returns 2 if anything failed."""
    with contextlib.suppress(AttributeError):  # a terminal without our letters gets question marks, not a traceback
        sys.stdout.reconfigure(errors="replace")
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
    began = time.monotonic()
    with leaving_on_signals():
        groups = _examine(settings, console)
    findings = [finding for group in groups for finding in group]
    console.print(_table(groups))
    console.print(_last_words(findings, time.monotonic() - began, settings.quick), soft_wrap=True)
    return 2 if any(finding.verdict == "FAIL" for finding in findings) else 0


def _examine(settings, console: Console) -> list[list[Finding]]:
    """Findings on packages, the machine, the disk and a tiny run; whatever happens, no process is left behind."""
    processes = Processes()
    groups = [examine_packages()]
    try:
        with console.status("Looking at the machine and the disk …") as status:
            probe = processes.start([sys.executable, "-m", "calotype.doctor_machine"])
            with _room(settings.out) as room:
                disk = [_where(settings.out, room), *examine_disk(_new(room / "disk"))]
                machine = examine("Device", lambda: _of_the_machine(probe))
                groups += [machine, disk]
                if not settings.quick:
                    status.update("Training a tiny run, killing it, resuming it, drawing with it …")
                    groups.append(_drill(_new(room / "drill"), processes, machine))
    except OSError as error:
        closed = Finding("Folder", "FAIL", f"nothing can be written here: {in_one_line(error)}", _OTHER_FOLDER)
        groups += [examine("Device", lambda: _of_the_machine(probe)), [closed]]
    finally:
        processes.end()
    return groups


def _drill(place: Path, processes: Processes, machine: list[Finding]) -> list[Finding]:
    on_cpu = any(finding.what == "Device" and finding.found.startswith("CPU") for finding in machine)
    drill = Drill(place, processes)
    try:
        return examine("A tiny run", lambda: drill.findings(on_cpu))
    finally:
        processes.end()
        drill.join()  # nobody may write any more when the folder is removed


def _of_the_machine(probe: subprocess.Popen) -> list[Finding]:
    """What the process that imports torch has found, or how it ended."""
    told = probe.communicate(timeout=_LONGEST)[0].decode(errors="replace").strip()
    last = told.splitlines()[-1] if told else "it said nothing"
    try:
        return [Finding(*row) for row in json.loads(last)]
    except (ValueError, TypeError):
        found = f"torch cannot be used: exit code {probe.returncode}, {in_one_line(last)}"
        return [Finding("Device", "FAIL", found, "pip install --upgrade --force-reinstall torch torchvision")]


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


@contextlib.contextmanager
def _room(out: Path | None) -> Iterator[Path]:
    """An empty folder to try things in, gone afterwards together with what was made on the way; raises OSError."""
    if out and out.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "it is a file", str(out))
    missing = [folder for folder in (out, *out.parents) if not folder.exists()] if out else []
    try:
        if out:
            out.mkdir(parents=True, exist_ok=True)
        where = {"prefix": ".calotype-doctor-", "dir": out or _here(), "ignore_cleanup_errors": True}
        with tempfile.TemporaryDirectory(**where) as room:
            yield Path(room).resolve()
    finally:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _here() -> str | None:
    """The current folder, where runs are likely to lie; None, the system's temporary one, where it is closed to us."""
    return os.curdir if os.access(os.curdir, os.W_OK) else None


def _where(out: Path | None, room: Path) -> Finding:
    if out or _here():
        return Finding("Folder", "pass", str(room.parent))
    return Finding("Folder", "note", f"{room.parent}: the current folder is closed to you", _OTHER_FOLDER)


@contextlib.contextmanager
def leaving_on_signals() -> Iterator[None]:
    """What ends a process from outside leaves as Ctrl-C does: everything is cleared away first."""

    def leave(number: int, _frame) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    earlier = {}
    with contextlib.suppress(ValueError):  # only the main thread hears signals
        earlier = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _table(groups: list[list[Finding]]) -> Table:
    """Rows without lines, an empty one between the groups."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for wraps in (False, False, True):
        table.add_column(no_wrap=not wraps)
    for i, group in enumerate(groups):
        if i:
            table.add_row()
        for finding in group:
            text = Text(finding.found)
            if finding.way_out:
                text.append(f"\n{finding.way_out}", style="italic")
            table.add_row(finding.what, Text(finding.verdict, style=_COLOURS[finding.verdict]), text)
    return table


def _last_words(findings: list[Finding], seconds: float, quick: bool) -> str:
    took = f"\n{len(findings)} examinations in {seconds:.0f} s"
    failed = [finding.what for finding in findings if finding.verdict == "FAIL"]
    if failed:
        return f"{took}; failed: {', '.join(failed)}. Do what stands there, then give `calotype doctor` again."
    if quick:
        return f"{took}, all well. Without --quick a tiny run is killed, resumed and drawn with too."
    return f"{took}, all well. Next: calotype run shapes --preset tiny --out runs/first"
