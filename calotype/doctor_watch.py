"""Runs commands of Calotype for `calotype doctor`, and notes every connection that Python is asked to make.

`python -m calotype.doctor_watch ORDERS REPORT`: ORDERS is JSON, a list of {"name", "words", "log"}; REPORT gets a line
of JSON for each command that ended: {"name", "code", "seconds", "reached"}.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

from calotype import cli

_ASKS_FOR_A_NAME = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
_SENDS = ("socket.connect", "socket.sendto", "socket.sendmsg")
_HERE = ("", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::")


def listen() -> list[str]:
    """A list that from now on grows with each look-up of a name and each connection beyond this machine."""
    reached: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        if event in _ASKS_FOR_A_NAME and (name := _text(arguments[0])) not in _HERE:
            reached.append(f"look-up of {name}")
        elif event in _SENDS and isinstance(arguments[1], tuple) and (name := _text(arguments[1][0])) not in _HERE:
            reached.append(f"connection to {name}")

    sys.addaudithook(hook)
    return reached


def _text(host) -> str:
    return host.decode(errors="replace") if isinstance(host, bytes) else str(host or "")


def main(orders: Path, report: Path) -> None:
    """Run one command after the other; what each prints goes to its own log."""
    reached = listen()
    for order in json.loads(orders.read_text(encoding="utf-8")):
        began = time.monotonic()
        _speak_into(Path(order["log"]))
        code = _run(order["words"])
        line = {"name": order["name"], "code": code, "seconds": time.monotonic() - began, "reached": list(reached)}
        with report.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        reached.clear()


def _speak_into(log: Path) -> None:
    """Standard output and error go to a file, those of C libraries and of children too."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _run(words: list[str]) -> int:
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    except Exception:
        traceback.print_exc()
        code = 1
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
