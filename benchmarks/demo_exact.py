"""The demo's answers under load: every picture is the one that its seed gives alone, and memory stays level.

    python -m benchmarks.demo_exact MODEL --generations 2000 --clients 16 --leave 50

Draws some seeds one after another, then as many pictures as asked by many visitors at once, and compares pixels; counts
what the denoiser still does after a visitor cancels, presses Stop or goes away. The last line is JSON; the exit code is
1 if a picture differed, memory grew by more than 5 MB a thousand pictures, a drawing went on for more than a step, or
anything but this machine was asked.
"""

import argparse
import asyncio
import hashlib
import io
import json
import random
import secrets
import sys
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from benchmarks.demo_server import Demo, Visitor, running

SEEDS = 40
STEPS, LONG = 4, 200
MOST_SLOPE = 5.0  # MB a thousand generations


def main() -> int:
    """Start the server, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--generations", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--leave", type=int, default=50, help="how often each: cancel, Stop, going away")
    args = parser.parse_args()
    with running(args.model) as demo:
        found = asyncio.run(Trial(demo, args).run())
    found["clean end"] = demo.process.returncode == 0
    for name, value in found.items():
        print(f"{name:36} {value}")
    print(json.dumps(found))
    return int(not _is_good(found))


def _is_good(found: dict) -> bool:
    level = found["MB a thousand"] is None or found["MB a thousand"] <= MOST_SLOPE
    stopped = max(found["evaluations after leaving"].values(), default=0) <= 1
    right = not found["wrong"] and not found["strangers"] and found["clean end"]
    return level and stopped and right and found["free again"]


class Trial:
    """All visitors of one server."""

    def __init__(self, demo: Demo, args):
        self.demo, self.args = demo, args
        self.memory: list[tuple[int, int]] = []  # pictures so far, resident bytes

    async def run(self) -> dict:
        """Serial, then together, then leaving."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.demo.url, timeout=240, limits=limits) as client:
            self.visitor = await Visitor(client).arrive()
            alone = {seed: await self.draw(seed) for seed in range(SEEDS)}
            began = time.monotonic()
            wrong = await self.together(alone)
            seconds = time.monotonic() - began
            after = {how.__name__: [await how() for _ in range(self.args.leave)] for how in self.ways()}
            free = await self.draw(0) == alone[0]
            healthy = (await client.get("/healthz")).status_code == 200
        return {
            "generations": self.args.generations,
            "wrong": wrong,
            "generations a second": round(self.args.generations / seconds, 2),
            "memory, MB": [round(bytes / 1e6) for _, bytes in self.memory[:: max(1, len(self.memory) // 12)]],
            "MB a thousand": self.slope(),
            "evaluations after leaving": {name: max(counts, default=0) for name, counts in after.items()},
            "left": sum(map(len, after.values())),
            "free again": free and healthy,
            "strangers": self.demo.counts.strangers,
        }

    def order(self, seed: int, steps: int = STEPS) -> list:
        """What the page sends for one picture of this seed."""
        call = self.visitor.calls["generate"]
        wanted = {"Images": 1, "Seed": seed, "Seed of each drawing": False, "Steps": steps}
        return [wanted.get(name, value) for name, value in zip(call["names"], call["values"], strict=True)]

    async def draw(self, seed: int) -> str:
        """The hash of the pixels drawn from this seed."""
        message = await self.visitor.result("generate", self.order(seed))
        assert message["success"], message
        gallery = message["output"]["data"][1]["value"]
        assert len(gallery) == 1, gallery
        content = (await self.visitor.client.get(gallery[0]["image"]["url"])).content
        return hashlib.sha256(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).tobytes()).hexdigest()

    async def together(self, alone: dict[int, str]) -> int:
        """Many visitors at once; how many pictures were not the one that was asked for."""
        dice = random.Random(0)
        seeds = [dice.randrange(SEEDS) for _ in range(self.args.generations)]
        left, wrong, done = iter(seeds), 0, 0

        async def client() -> None:
            nonlocal wrong, done
            for seed in left:
                wrong += await self.draw(seed) != alone[seed]
                done += 1
                if done % max(1, self.args.generations // 100) == 0:
                    self.memory.append((done, self.demo.memory))

        await asyncio.gather(*(client() for _ in range(self.args.clients)))
        return wrong

    def slope(self) -> float | None:
        """MB by which memory grows over a thousand pictures, fitted after a warm-up; None for too few to tell."""
        warm = [(done, bytes / 1e6) for done, bytes in self.memory if done > 0.4 * self.args.generations]
        if self.args.generations < 1000:
            return None
        done, megabytes = np.array(warm).T
        return round(float(np.polyfit(done / 1000, megabytes, 1)[0]), 2)

    # Ways to leave; each gives the evaluations that began after the server knew

    def ways(self) -> list:
        """All of them."""
        return [self.cancel, self.stop, self.go_away]

    async def cancel(self) -> int:
        """As gradio_client's job.cancel()."""
        response, session = await self.visitor.join("generate", self.order(1, LONG))
        event = response.json()["event_id"]
        body = {"session_hash": session, "event_id": event, "fn_index": self.visitor.calls["generate"]["id"]}
        return await self._while_drawing(session, "cancel", body)

    async def stop(self) -> int:
        """As the button Stop."""
        _, session = await self.visitor.join("generate", self.order(1, LONG))
        stop = self.visitor.calls["order"]
        body = {"data": [None] * len(stop["values"]), "fn_index": stop["id"], "session_hash": session}
        return await self._while_drawing(session, "run/order", body)

    async def _while_drawing(self, session: str, path: str, body: dict) -> int:
        """Post this as soon as pictures are on their way, then see what is still drawn."""
        async for message in self.visitor.messages(session):
            if message["msg"] == "process_generating" and "Step" in json.dumps(message):
                (await self.visitor.client.post(f"/gradio_api/{path}", json=body)).raise_for_status()
                return await self._still_drawn()
        raise AssertionError("the drawing ended before it could be left")

    async def go_away(self) -> int:
        """As a browser that is closed: its connection breaks off."""
        _, session = await self.visitor.join("generate", self.order(1, LONG))
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.demo.url.rpartition(":")[2]))
        address = f"GET /gradio_api/queue/data?session_hash={session} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        writer.write(address.encode())
        while b"Step" not in await reader.readuntil(b"\n"):
            pass
        writer.transport.abort()
        await asyncio.sleep(0.05)  # for the network of this machine to say so
        return await self._still_drawn()

    async def _still_drawn(self) -> int:
        """Evaluations from now on."""
        before = self.demo.counts.evaluations
        await asyncio.sleep(0.5 + secrets.randbelow(100) / 1000)
        return self.demo.counts.evaluations - before


if __name__ == "__main__":
    sys.exit(main())
