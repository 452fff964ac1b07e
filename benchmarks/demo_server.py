"""A demo in a process of its own for the measurements, which counts what its denoiser does, opens and asks elsewhere.

    python -m benchmarks.demo_server FOLDER MODEL [FLAGS OF calotype demo]

FOLDER gets two files that this process writes and others read: `counts`, with the evaluations of the denoiser and how
often anything but this machine was looked up or connected to, and `opened`, with the path of each file and a NUL.
"""

import asyncio
import contextlib
import json
import mmap
import os
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx

PATIENCE = 240  # seconds that a visitor waits for a picture
_COUNTS = struct.Struct("<QQ")
_HERE = {"127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", None}


class Counts:
    """Two numbers that one process adds to and others read."""

    def __init__(self, file: Path):
        with file.open("r+b") as stream:
            self._memory = mmap.mmap(stream.fileno(), _COUNTS.size)

    def add(self, evaluations: int = 0, strangers: int = 0) -> None:
        """Count."""
        before = _COUNTS.unpack(self._memory[:])
        self._memory[:] = _COUNTS.pack(before[0] + evaluations, before[1] + strangers)

    @property
    def evaluations(self) -> int:
        """Forward passes of any UNet."""
        return _COUNTS.unpack(self._memory[:])[0]

    @property
    def strangers(self) -> int:
        """Connections and look-ups beyond this machine."""
        return _COUNTS.unpack(self._memory[:])[1]


class Demo:
    """A running demo: its address, its process, what it counted, opened and logged."""

    def __init__(self, url: str, process: subprocess.Popen, folder: Path, log):
        self.url, self.process, self.counts = url, process, Counts(folder / "counts")
        self._opened, self._log = folder / "opened", log

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return self._status("VmRSS")

    @property
    def peak(self) -> int:
        """The most resident bytes since `forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        """Measure the peak anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    @property
    def opened(self) -> list[str]:
        """The files that it opened so far."""
        return self._opened.read_text(errors="replace").split("\0")[:-1]

    @property
    def log(self) -> str:
        """What it wrote to stdout and stderr so far."""
        self._log.seek(0)
        return self._log.read()


@contextlib.contextmanager
def running(model: Path, *flags: str, folder: Path | None = None) -> Iterator[Demo]:
    """A demo of this model that answers, ended by SIGTERM afterwards; `folder` is where it makes its temporary one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryFile("a+") as log:
        (Path(here) / "counts").write_bytes(bytes(_COUNTS.size))
        (Path(here) / "opened").touch()
        words = [sys.executable, "-m", "benchmarks.demo_server", here, str(model), "--port", str(port), *flags]
        environment = None if folder is None else os.environ | {"TMPDIR": str(folder)}
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        demo = Demo(f"http://127.0.0.1:{port}", process, Path(here), log)
        try:
            _wait(demo)
            yield demo
        finally:
            process.terminate()
            process.wait(60)


def _wait(demo: Demo) -> None:
    for _ in range(1200):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(demo.url + "/readyz", timeout=60).status_code == 200:
                return
        assert demo.process.poll() is None, f"the demo did not start\n{demo.log}"
        time.sleep(0.1)
    raise AssertionError("the demo did not start in two minutes")


class Visitor:
    """What a page does, without the page: functions by name, through the queue."""

    def __init__(self, client: httpx.AsyncClient):
        self.client, self.calls = client, {}

    async def arrive(self) -> "Visitor":
        """Learn the page's functions and the values that it gives them."""
        config = (await self.client.get("/config")).json()
        values = {part["id"]: part["props"].get("value") for part in config["components"]}
        names = {part["id"]: part["props"].get("label") for part in config["components"]}
        self.calls = {
            call["api_name"]: {
                "id": call["id"],
                "values": [values[i] for i in call["inputs"]],
                "names": [names[i] for i in call["inputs"]],
            }
            for call in config["dependencies"]
        }
        return self

    async def join(self, name: str, data: list | None = None, session: str = "") -> tuple[httpx.Response, str]:
        """Ask for a function; the answer and the session."""
        session = session or secrets.token_hex(6)
        call = self.calls[name]
        body = {"data": call["values"] if data is None else data, "fn_index": call["id"], "session_hash": session}
        return await self.client.post("/gradio_api/queue/join", json=body), session

    async def messages(self, session: str) -> AsyncIterator[dict]:
        """What comes of it, message by message."""
        address, patience = "/gradio_api/queue/data", httpx.Timeout(PATIENCE)
        async with self.client.stream("GET", address, params={"session_hash": session}, timeout=patience) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    async def result(self, name: str, data: list | None = None) -> dict:
        """The last message of a call; while the queue is full it is asked again as the server says."""
        while True:
            response, session = await self.join(name, data)
            if response.status_code != 503:
                break
            await asyncio.sleep(int(response.headers["retry-after"]))
        response.raise_for_status()
        async for message in self.messages(session):
            if message["msg"] == "process_completed":
                return message
        raise AssertionError("an accepted request was not answered")


def main() -> int:
    """Serve as `calotype demo` does, and count."""
    folder = Path(sys.argv[1])
    counts, opened = Counts(folder / "counts"), os.open(folder / "opened", os.O_WRONLY | os.O_APPEND)

    def watch(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            os.write(opened, os.path.abspath(os.fsencode(args[0])).replace(b"\0", b"%00") + b"\0")
        if event == "socket.getaddrinfo" and args[0] not in _HERE:
            counts.add(strangers=1)
        if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in _HERE:
            counts.add(strangers=1)

    sys.addaudithook(watch)
    import torch

    def count(module, *_) -> None:
        if type(module).__name__.startswith("UNet2D"):
            counts.add(evaluations=1)

    torch.nn.modules.module.register_module_forward_pre_hook(count)
    from calotype import cli

    return cli.main(["demo", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
