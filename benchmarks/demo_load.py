"""The demo under load: many visitors at once, some of whom leave, send garbage or mean harm.

    python -m benchmarks.demo_load MODEL --clients 32 --seconds 180

Starts `calotype demo MODEL`, warms it up, lets the visitors loose, and prints what they were answered and how much
memory the server held before and after. The last line is JSON; the exit code is 1 if the server answered with a 5xx
other than 503 with Retry-After, left an accepted request without an answer, grew by more than 5 %, or died.
"""

import argparse
import asyncio
import io
import json
import random
import re
import secrets
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import httpx
from PIL import Image

from benchmarks.demo_server import PATIENCE, Demo, Visitor, running

_GROWTH = 0.05


def main() -> int:
    """Start the server, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=180)
    args = parser.parse_args()
    with running(args.model) as demo:
        found = asyncio.run(Siege(demo, args).run())
        errors = demo.log
    ends = [text.splitlines()[-1] for text in re.findall(r"Traceback.*?\n(?=\S[^\n]*\n)[^\n]*", errors, re.DOTALL)]
    found["tracebacks in the log"] = dict(Counter(ends))
    for name, value in found.items():
        print(f"{name:36} {value}")
    print(json.dumps(found))
    good = found["alive"] and not found["other 5xx"] and not found["unanswered"] and found["growth"] <= _GROWTH
    return int(not good or found["503 without Retry-After"] > 0)


class Siege:
    """All visitors of one server."""

    def __init__(self, demo: Demo, args):
        self.demo, self.args = demo, args
        self.statuses, self.done, self.bad = Counter(), Counter(), Counter()
        self.seen, self.unanswered, self.memory = [], 0, []

    async def run(self) -> dict:
        """Warm up, besiege, cool down; what was found."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.demo.url, timeout=PATIENCE, limits=limits) as client:
            self.client = client
            self.calls = (await Visitor(client).arrive()).calls
            until = time.monotonic() + max(self.args.seconds / 3, 10)
            await asyncio.gather(*(self._visitor(i, until) for i in range(self.args.clients)))
            await asyncio.sleep(3)
            warm, self.statuses, self.done, self.bad = self.demo.memory, Counter(), Counter(), Counter()
            until = time.monotonic() + self.args.seconds
            await asyncio.gather(*(self._visitor(i, until) for i in range(self.args.clients)), self._watch(until))
            await asyncio.sleep(3)
            after = self.demo.memory
            alive = self.demo.process.poll() is None and (await client.get("/")).status_code == 200
            answered = await self._draw(random.Random(0)) == "complete"
        return {
            "alive": alive and answered,
            "statuses": {str(k): v for k, v in sorted(self.statuses.items())},
            "visits": dict(self.done),
            "other 5xx": self.bad["5xx"],
            "503 without Retry-After": self.bad["no Retry-After"],
            "unanswered": self.unanswered,
            "memory warm, MB": round(warm / 1e6),
            "memory after, MB": round(after / 1e6),
            "memory on the way, MB": self.memory,
            "growth": round(after / warm - 1, 4),
            "first 5xx": self.seen[:5],
        }

    async def _visitor(self, number: int, until: float) -> None:
        dice = random.Random(number)
        kinds = {self._draw: 8, self._leave: 4, self._garbage: 3, self._upload: 3, self._huge: 1, self._wander: 2}
        while time.monotonic() < until:
            kind = dice.choices(list(kinds), list(kinds.values()))[0]
            try:
                how = await kind(dice)
            except (httpx.HTTPError, OSError) as error:
                how = type(error).__name__
            self.done[f"{kind.__name__[1:]}: {how}"] += 1
            await asyncio.sleep(dice.uniform(0, 0.5))

    async def _watch(self, until: float) -> None:
        while time.monotonic() < until:
            self.memory.append(round(self.demo.memory / 1e6))
            await asyncio.sleep(self.args.seconds / 9)

    async def _ask(self, method: str, path: str, **more) -> httpx.Response:
        response = await self.client.request(method, path, **more)
        self.statuses[response.status_code] += 1
        if response.status_code == 503 and "retry-after" not in response.headers:
            self.bad["no Retry-After"] += 1
        if response.status_code >= 500 and response.status_code != 503:
            self.bad["5xx"] += 1
            self.seen.append(f"{method} {path} {str(more)[:120]}: {response.text[:120]}")
        return response

    async def _draw(self, dice: random.Random) -> str:
        """Ask for pictures and wait for them."""
        return await self._queue("generate", self.calls["generate"]["values"])

    async def _leave(self, dice: random.Random) -> str:
        """Ask for pictures and go away in the middle."""
        return await self._queue("generate", self.calls["generate"]["values"], leave=True)

    async def _queue(self, name: str, data: list, leave: bool = False) -> str:
        session = secrets.token_hex(6)
        body = {"data": data, "fn_index": self.calls[name]["id"], "session_hash": session}
        response = await self._ask("POST", "/gradio_api/queue/join", json=body)
        if response.status_code != 200:
            return str(response.status_code)
        async with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
            async for line in stream.aiter_lines():
                if leave and "process_generating" in line:
                    return "left"
                if "process_completed" in line:
                    return "complete" if json.loads(line.partition("data: ")[2])["success"] else "refused"
        self.unanswered += 1
        return "unanswered"

    async def _garbage(self, dice: random.Random) -> str:
        session = secrets.token_hex(6)
        good = {"fn_index": self.calls["generate"]["id"], "session_hash": session}
        bodies = [
            b"{", b"", b"\x00\xff" * 400, b"[]", b'{"data": 3}',
            {"data": None, "session_hash": session}, good | {"data": []}, good | {"data": ["x"] * 40},
            good | {"data": [{"path": "/etc/passwd"}] * 6}, {"data": [], "fn_index": 10**9, "session_hash": session},
            {"data": [], "fn_index": -1, "session_hash": session}, {"data": [1e308] * 6} | good,
            {"data": [None] * 6, "fn_index": "x", "session_hash": 7}, good | {"data": [[[[[]]]]] * 6},
        ]  # fmt: skip
        body = dice.choice(bodies)
        sent = {"content": body} if isinstance(body, bytes) else {"json": body}
        path = "/gradio_api/" + dice.choice(["queue/join", "run/generate", "component_server", "cancel"])
        return str((await self._ask("POST", path, headers={"content-type": "application/json"}, **sent)).status_code)

    async def _upload(self, dice: random.Random) -> str:
        """A file, mostly one that should not be there, and the request to reconstruct it."""
        name, content = dice.choice(_FILES)
        response = await self._ask("POST", "/gradio_api/upload", files={"files": (name, content, "image/png")})
        if response.status_code != 200:
            return str(response.status_code)
        file = {"path": response.json()[0], "meta": {"_type": "gradio.FileData"}}
        others = self.calls["reconstruct"]["values"][1:]
        return f"{name[:12]!r} {await self._queue('reconstruct', [file, *others])}"

    async def _huge(self, dice: random.Random) -> str:
        async def endless():
            for _ in range(40):
                yield b"x" * 1_000_000

        if dice.random() < 0.5:
            response = await self._ask("POST", "/gradio_api/queue/join", content=endless())
        else:
            response = await self._ask("POST", "/gradio_api/upload", files={"files": ("a.png", b"x" * 20_000_000)})
        return str(response.status_code)

    async def _wander(self, dice: random.Random) -> str:
        path = dice.choice(
            ["/", "/config", "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../etc/passwd", "/nothing", "/docs"]
            + ["/gradio_api/info", "/gradio_api/queue/data?session_hash=nobody", "/%2e%2e/%2e%2e/etc/passwd"]
        )
        try:
            response = await asyncio.wait_for(self._ask("GET", path), 5)
        except TimeoutError:
            return "left"
        assert b"root:x:0" not in response.content, f"{path} gave a file of the machine away"
        return str(response.status_code)


def _bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = 60_000
    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    data = zlib.compress(b"\x00" * 1_000_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _small() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(file, "PNG")
    return file.getvalue()


_FILES = [
    ("a.png", _small()), ("bomb.png", _bomb()), ("cut.png", _small()[:60]), ("text.png", b"no picture"),
    ("../../../etc/cron.d/x.png", _small()), ("x" * 400 + ".png", _small()), ("\u202egnp.exe", b"MZ"),
    ("page.html", b"<script>alert(1)</script>"), ("empty.png", b""),
    ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
