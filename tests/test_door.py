"""The door before Gradio's server, with a real ASGI application behind it."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from calotype.demo.door import Door


async def size(request):
    return PlainTextResponse(str(len(await request.body())))


async def full(request):
    return JSONResponse({"detail": "Queue is full."}, 503)


async def trip(request):
    return PlainTextResponse({}[(await request.json())["number"]])


async def fault(request):
    raise RuntimeError("a fault of our own")


ROUTES = [
    Route("/size", size, methods=["POST"]),
    Route("/full", full),
    Route("/trip", trip, methods=["POST"]),
    Route("/fault", fault, methods=["POST"]),
]


room = []


def ask(method, path, **more):
    async def call():
        door = Middleware(Door, most_bytes=2000, most_words=1000, make_room=room.append)
        transport = httpx.ASGITransport(Starlette(routes=ROUTES, middleware=[door]), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **more)

    return asyncio.run(call())


async def endless(count):
    for _ in range(count):
        yield b"x" * 100


@pytest.mark.parametrize("content, status", [(b"x" * 1000, 200), (b"x" * 1001, 413), (10, 200), (11, 413)])
def test_a_body_beyond_the_limit_stays_out(content, status):
    """Whether it is announced or comes in pieces that nobody announced."""
    content = content if isinstance(content, bytes) else endless(content)
    answer = ask("POST", "/size", content=content)
    assert answer.status_code == status
    assert answer.text == ("1000" if status == 200 else "This is larger than the server takes.")


def test_files_may_be_larger_and_room_is_made_for_them():
    room.clear()
    assert ask("POST", "/size", files={"files": ("a.png", b"x" * 1500)}).status_code == 200 and room == [2000]
    assert ask("POST", "/size", files={"files": ("a.png", b"x" * 2000)}).status_code == 413 and room == [2000]


def test_a_full_queue_says_when_to_come_back():
    answer = ask("GET", "/full")
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.json() == {"detail": "Queue is full."}
    assert "retry-after" not in ask("POST", "/size", content=b"").headers


def test_a_length_that_is_no_number_is_not_believed():
    answer = ask("POST", "/size", content=endless(11), headers={"content-length": "-5"})
    assert answer.status_code == 413


def test_a_request_that_makes_no_sense_is_no_fault_of_the_server():
    answer = ask("POST", "/trip", json={"number": -1})
    assert answer.status_code == 400 and answer.text.startswith("There is no such function")
    assert ask("POST", "/fault").status_code == 500  # and a real one stays one
