"""A demo that really runs, and what it gives away to those who mean no good: nothing of what lies outside it."""

import asyncio
import http.client
import json
import os
import re
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import demo_probes as probes
import httpx
import pytest
from models import pipeline, tiny_unet

from benchmarks.demo_server import Visitor, running

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).parents[1]
CANARY = "canary-7fbe1c0d that must stay where it is"
PATIENCE = 60
MOST_RISE = 64e6  # bytes
FILE = {"_type": "gradio.FileData"}
MULTIPART = {"content-type": "multipart/form-data; boundary=a"}
SHOWN = {"image/png", "text/plain", "application/json"}  # nothing that a browser would run
# What a Python that serves requests may read beside itself, its packages, the model and its temporary folder.
READS = re.compile(r"/dev/(null|urandom)|/etc/(mime\.types|localtime)|/sys/.*|/usr/share/zoneinfo/.*")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A demo whose temporary folder lies beside a canary, with a listener that nobody should call."""
    place = tmp_path_factory.mktemp("place")
    (place / "temporary").mkdir()
    (place / "canary.png").write_text(CANARY)
    pipe = pipeline(tiny_unet(classes=2), id2label={"0": "red", "1": "blue"})
    pipe.save_pretrained(place / "models" / "prints" / "pipeline")
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answering, args=(listener, calls), daemon=True).start()
        with running(place / "models/prints", folder=place / "temporary") as demo:
            (cache,) = place.glob("temporary/calotype-demo-*/cache")
            (cache / "link.png").symlink_to(place / "canary.png")
            words = {"canary": str(place / "canary.png"), "cache": str(cache), "link": str(cache / "link.png")}
            words |= {"port": listener.getsockname()[1], "file": str(place / "canary.png")[1:], "up": "../" * 12}
            here = SimpleNamespace(demo=demo, place=place, cache=cache, words=words, seen=[], calls=calls, pages={})
            here.before = len(demo.opened)
            warm_up(here)
            yield here
    assert demo.process.returncode == 0 and not list((place / "temporary").iterdir())


def answering(listener, calls):
    """Note who calls."""
    with suppress(OSError):
        while True:
            caller, _ = listener.accept()
            calls.append(caller.getpeername())
            caller.close()


def warm_up(server):
    """Once through everything, so that what is measured later is not what is imported for the first time."""
    path = upload(server, "a.png", probes.small())
    assert call(server, "reconstruct", [{"path": path, "meta": FILE}])["success"]
    assert call(server, "generate")["success"]


@pytest.fixture(autouse=True)
def nothing_escapes(server):
    """After each group: no canary, no traceback, no path of this machine in an answer; the server is well."""
    server.seen.clear()
    yield
    strange = [
        str(ROOT),
        sys.prefix,
        str(Path.home()) + "/",
        str(server.place / "models"),
        os.path.dirname(os.__file__),
    ]
    for what, status, content in server.seen:
        assert CANARY.encode() not in content, what
        assert b"Traceback" not in content and b'.py", line' not in content and b"root:x:0" not in content, what
        assert status < 500 or status == 503, (what, status, content[:200])
        found = [path for path in strange if path.encode() in content and path not in repr(what)]
        assert not found, (what, found, content[:300])
    assert httpx.get(server.demo.url + "/healthz", timeout=PATIENCE).text == "alive"
    assert server.calls == [] and server.demo.counts.strangers == 0


def raw(server, method, path, body=b"", **headers):
    """Send this as it stands, with nothing tidied; the status and what came back."""
    connection = http.client.HTTPConnection("127.0.0.1", int(server.demo.url.rpartition(":")[2]), timeout=PATIENCE)
    connection._validate_path = connection._validate_host = lambda text: None
    connection._encode_request = lambda request: request.encode("utf-8", "surrogateescape")
    try:
        connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
        for name, value in headers.items():
            connection._buffer.append(f"{name}: {value}".encode("latin-1", "replace"))
        if not {"Content-Length", "Transfer-Encoding"} & headers.keys():
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        status, content = answer.status, repr(answer.getheaders()).encode() + answer.read()
    except (OSError, http.client.HTTPException) as error:  # the server hung up
        status, content = 0, repr(error).encode()
    finally:
        connection.close()
    server.seen.append(((method, path[:200], str(headers)[:200]), status, content))
    return status, content


def visit(server, steps):
    """Let a visitor do something."""

    async def visiting():
        async with httpx.AsyncClient(base_url=server.demo.url, timeout=PATIENCE) as client:
            visitor = Visitor(client)
            visitor.calls = server.pages or (await visitor.arrive()).calls
            server.pages.update(visitor.calls)
            return await steps(visitor)

    return asyncio.run(visiting())


def call(server, name, data=None):
    """The last message of a call with these first values, and the page's own for the rest."""

    async def steps(visitor):
        values = None if data is None else [*data, *visitor.calls[name]["values"][len(data) :]]
        return await visitor.result(name, values)

    message = visit(server, steps)
    server.seen.append(((name, data), 200, json.dumps(message["output"].get("error")).encode()))
    return message


def upload(server, name, content):
    """Upload a file; its path in the cache, or None where it was refused."""
    answer = httpx.post(server.demo.url + "/gradio_api/upload", files={"files": (name, content)}, timeout=PATIENCE)
    server.seen.append((("upload", name), answer.status_code, answer.content))
    return answer.json()[0] if answer.status_code == 200 else None


def test_no_address_leads_out(server):
    sent = 0
    for prefix in probes.PREFIXES:
        for route in probes.ROUTES:
            for words in (server.words, server.words | {"file": "etc/passwd"}):
                status, content = raw(server, "GET", prefix + route.format(**words))
                assert status in (0, 400, 403, 404, 421) or (status == 200 and b"<html" not in content), (prefix, route)
                sent += 1
    assert sent >= 400


def test_no_value_names_a_file_or_a_model(server):
    """Whatever the input, a path outside the cache or an address is refused before anything is opened."""
    for target in probes.TARGETS:
        path = target.format(**server.words)
        file = {"path": path, "url": path, "meta": FILE, "orig_name": path[:99]}
        assert not call(server, "reconstruct", [file])["success"], target
        assert not call(server, "restore", [file])["success"], target
    for target in probes.TARGETS[::4]:
        path = target.format(**server.words)
        file = {"path": path, "url": path, "meta": FILE}
        assert not call(server, "generate", ["red", file])["success"], target  # where a number is asked
        assert not call(server, "generate", [path or "?"])["success"], target  # as a label
    server_side = {"path": server.words["canary"], "meta": FILE}
    for name, data in (
        ("edit", [{"background": server_side, "layers": [], "composite": None}]),
        ("interpolate", [1, "red", server_side]),
        ("arithmetic", [[{"image": server_side, "caption": None}]]),
    ):
        assert not call(server, name, data)["success"], name


def test_names_stay_in_the_cache_and_nothing_is_shown_that_could_run(server):
    before = {path for path in server.place.rglob("*") if server.cache not in path.parents}
    for name in probes.NAMES:
        path = upload(server, name, b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
        if path is None:
            continue
        assert path.startswith(f"{server.cache}/") and os.path.isfile(path) and os.path.realpath(path) == path, name
        answer = httpx.get(f"{server.demo.url}/gradio_api/file={quote(path)}", timeout=PATIENCE)
        kind, disposition = (answer.headers.get(name, "") for name in ("content-type", "content-disposition"))
        assert answer.status_code == 200, name
        if disposition.startswith("inline"):
            assert kind.partition(";")[0] in SHOWN, name
        else:
            assert disposition.startswith("attachment") and kind.startswith("application/octet-stream"), name
        assert answer.headers["x-content-type-options"] == "nosniff"
    spool = {path for path in server.place.rglob("*") if server.cache not in path.parents}
    assert spool == before


def test_there_is_no_way_round_the_queue(server):
    body = json.dumps({"data": [], "session_hash": "a"}).encode()
    for method, path in probes.BYPASSES:
        status, content = raw(
            server, method, path, body if method == "POST" else b"", **{"Content-Type": "application/json"}
        )
        assert status in (0, 400, 403, 404, 405, 422, 501), (method, path, status, content[:200])
    assert server.demo.counts.evaluations == (now := server.demo.counts.evaluations) and now


def test_nonsense_is_refused_in_a_word(server):
    calls = visit(server, _calls)
    for path, body in probes.junk(calls["generate"]["id"], len(calls["generate"]["values"])):
        status, _ = raw(server, "POST", f"/gradio_api/{path}", body, **{"Content-Type": "application/json"})
        assert status in (200, 400, 404, 413, 422, 503), (path, body[:80], status)


async def _calls(visitor):
    return visitor.calls


def test_strange_headers_change_nothing(server):
    for headers in probes.HEADERS:
        for method, path in (("GET", "/"), ("POST", "/gradio_api/queue/join"), ("GET", "/config")):
            status, content = raw(
                server, method, path, b"4\r\nabcd\r\n0\r\n\r\n" if method == "POST" else b"", **headers
            )
            assert b"evil.example" not in content, (method, path, headers)
            assert status in (0, 200, 400, 403, 404, 413, 421, 422, 431, 501), (method, path, headers, status)
    for path in ("/", "/gradio_api/queue/join", "/gradio_api/heartbeat/a", "/ws"):
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "A" * 22,
        }
        assert raw(server, "GET" if path == "/" else "PUT", path, **upgrade)[0] != 101


def rise(server, action):
    """By how much the server's memory peaked over what it held before."""
    server.demo.forget_peak()
    before = server.demo.memory
    action()
    return server.demo.peak - before


def test_giant_bodies_are_not_taken_in(server, sized):
    size = sized(100, 1000)

    def endless():
        for _ in range(size):
            yield b"x" * 1_000_000

    def files(count, bytes):
        return [("files", (f"{i}.png", b"x" * bytes)) for i in range(count)]

    def send(path, **more):
        with suppress(httpx.TransportError):  # the server hangs up before all is sent
            answer = httpx.post(server.demo.url + path, timeout=PATIENCE, **more)
            server.seen.append(((path, "giant"), answer.status_code, answer.content))
            assert answer.status_code in (400, 413, 422), (path, answer.status_code)

    for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/component_server", "/login"):
        assert rise(server, lambda path=path: send(path, content=endless())) <= MOST_RISE, path
        assert rise(server, lambda path=path: send(path, files=files(20, 2_000_000))) <= MOST_RISE, path
        assert rise(server, lambda path=path: send(path, content=endless(), headers=MULTIPART)) <= MOST_RISE, path
    assert sum(path.stat().st_size for path in server.cache.rglob("*") if path.is_file()) <= 16_000_000


def test_bombs_do_not_go_off(server):
    for name, content in probes.bombs().items():
        path = upload(server, f"{name}.png", content)
        file = {"path": path, "meta": FILE}
        for function in ("reconstruct", "restore")[: 1 + (name in ("text", "profile"))]:
            assert rise(server, lambda f=function, file=file: call(server, f, [file])) <= MOST_RISE, name


def test_nothing_else_was_opened(server):
    """All that was opened since the server began to serve lies in its own places; runs last."""
    roots = [ROOT, sys.prefix, sys.base_prefix, server.place / "models", server.place / "temporary"]
    roots = [f"{os.path.realpath(root)}/" for root in roots] + [f"{root}/" for root in roots]
    opened = set(server.demo.opened[server.before :])
    assert len(opened) > 20  # the hook works
    assert not [path for path in opened if not path.startswith(tuple(roots)) and not READS.fullmatch(path)]
