"""Which addresses there are, who may ask, what every answer says to the browser, and who gets in by what password."""

import asyncio
import os

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from calotype import cli
from calotype.config import parse
from calotype.demo import access, cache
from calotype.demo.app import welcome
from calotype.demo.gate import Gate
from calotype.demo.headers import HEADERS, Headers
from calotype.demo.listening import listen
from calotype.errors import UserError
from calotype.settings import DemoSettings

HERE = {"host": "127.0.0.1:7860"}


async def echo(request):
    return JSONResponse(dict(request.headers))


@pytest.fixture
def ask(tmp_path):
    """Ask a gate with everything behind it."""
    behind = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "HEAD", "POST", "PUT", "OPTIONS"])])

    def call(method, path, headers=HERE, public=False, **more):
        app = Headers(Gate(behind, cache.Cache(tmp_path), {"", "other"}, public))

        async def request():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
                return await client.request(method, path, headers=headers, **more)

        return asyncio.run(request())

    return call


# The gate


@pytest.mark.parametrize(
    "method, path, status",
    [
        *(("GET", path, 200) for path in ("/", "/other", "/other/", "/config", "/assets/a.js", "/healthz", "/readyz")),
        *(("GET", path, 200) for path in ("/gradio_api/info", "/gradio_api/queue/data?session_hash=a")),
        *(("POST", path, 200) for path in ("/login", "/gradio_api/queue/join", "/gradio_api/run/generate")),
        *(("GET", path, 404) for path in ("/nothing", "/monitoring", "/gradio_api/openapi.json", "/docs", "//")),
        *(("GET", path, 404) for path in ("/gradio_api/proxy=http://a.hf.space/", "/gradio_api/vibe-code")),
        *(("POST", path, 404) for path in ("/", "/gradio_api/vibe-edit", "/gradio_api/process_recording")),
        *((method, "/config", 404) for method in ("PUT", "OPTIONS")),
    ],
)
def test_only_what_the_page_uses_is_there(ask, method, path, status):
    answer = ask(method, path)
    assert answer.status_code == (status if path != "//" else 200)  # the same page as "/"
    assert HEADERS.items() <= dict(answer.headers).items()


def test_files_of_the_cache_alone_are_served(ask, tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/a.png").write_bytes(b"a")
    secret = tmp_path.parent / "secret.png"
    secret.write_bytes(b"secret")
    (tmp_path / "link.png").symlink_to(secret)
    assert ask("GET", f"/gradio_api/file={tmp_path}/inside/a.png").status_code == 200
    others = [f"{tmp_path}/link.png", str(secret), f"{tmp_path}/inside/../../secret.png", f"{tmp_path}//inside/a.png"]
    others += [str(tmp_path), "a.png", f"{tmp_path}/inside", f"{tmp_path}/{'x' * 400}", f"{tmp_path}/a%00.png"]
    for path in (*others, "http://127.0.0.1/", "file:///etc/passwd", "https://example.org/a.png"):
        assert ask("GET", f"/gradio_api/file={path}").status_code == 403, path


def test_other_names_of_this_machine_are_not_believed_unless_it_is_public(ask):
    for host in ("evil.example", "127.0.0.1.evil.example:7860", "localhost@evil.example", ""):
        assert ask("GET", "/", {"host": host}).status_code == 421
        assert ask("GET", "/", {"host": host}, public=True).status_code == 200
    for host in ("localhost", "LOCALHOST:7860", "[::1]:80"):
        assert ask("GET", "/", {"host": host}).status_code == 200


def test_only_a_public_server_hears_what_proxies_say(ask):
    said = {"x-forwarded-host": "evil.example", "x-forwarded-proto": "https", "x-gradio-server": "http://evil.example"}
    assert not said.keys() & ask("GET", "/", HERE | said).json().keys()
    assert said.keys() & ask("GET", "/", HERE | said, public=True).json().keys() == said.keys() - {"x-gradio-server"}


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),  # no browser
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:7861"}, 403),  # another server of this machine
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:7860"}, 403),
        ({"sec-fetch-site": "same-origin", "origin": "https://behind.a.proxy"}, 200),
    ],
)
def test_other_sites_pages_may_not_ask(ask, headers, status):
    assert ask("POST", "/gradio_api/queue/join", HERE | headers).status_code == status


# The cache


def test_the_oldest_files_go_first(tmp_path, monkeypatch):
    for i in range(10):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}/a").write_bytes(bytes(100))
        os.utime(tmp_path / f"{i}/a", ns=(i, i))
    small = cache.Cache(tmp_path, most=1000)
    assert small.make_room() == 1000 and small.make_room(250) == 700
    assert sorted(path.name for path in tmp_path.iterdir()) == list("3456789")
    monkeypatch.setattr(cache, "MOST_FILES", 2)
    assert small.make_room() == 200 and sorted(path.name for path in tmp_path.iterdir()) == ["8", "9"]


# Who gets in


def settings(*flags):
    return parse(DemoSettings, ["model", *flags], "calotype demo")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "example.org", "127.0.0.1.example.org"])
def test_others_are_let_in_only_by_public(host, capsys):
    assert cli.main(["demo", "nowhere", "--host", host]) == 2
    words = capsys.readouterr().err
    assert f"--host {host}" in words and "--public" in words and words.count("\n") == 1
    assert settings("--host", host, "--public").address == host


def test_the_address_follows_public():
    assert settings().address == "127.0.0.1" and settings("--public").address == "0.0.0.0"
    assert settings("--host", "::1").address == "::1" and settings("--host", "127.8.8.8").address == "127.8.8.8"
    assert settings("--public", "--host", "127.0.0.1").address == "127.0.0.1"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--no-auth"], "without --public"),
        (["--public", "--no-auth", "--password-file", "a"], "exclude each other"),
        (["--port", "0"], "--port"),
    ],
)
def test_flags_that_contradict_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        settings(*flags)


def test_a_model_is_asked_for():
    with pytest.raises(UserError, match="MODEL|models"):
        parse(DemoSettings, [], "calotype demo")
    assert [str(model) for model in parse(DemoSettings, ["a", "b"], "calotype demo").models] == ["a", "b"]


def test_a_password_is_new_each_time_or_from_a_file(tmp_path):
    first, second = (access.password_for(True, False, None) for _ in range(2))
    assert first != second and len(first) >= 16
    assert access.password_for(True, True, None) is None and access.password_for(False, False, None) is None
    (tmp_path / "good").write_text("correct horse\nmore\n")
    assert access.password_for(False, False, tmp_path / "good") == "correct horse"
    (tmp_path / "short").write_text("1234567")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, reason in (("short", "7 characters"), ("binary", "not text"), ("none", "No such file")):
        with pytest.raises(UserError, match=f"--password-file .*{name}.*{reason}"):
            access.password_for(True, False, tmp_path / name)


def test_the_password_is_told_once_unless_it_is_in_a_file():
    assert "secret" in welcome("x · Calotype", "http://h/", settings("--public"), "secret")
    assert "secret" not in welcome("x", "http://h/", settings("--public", "--password-file", "a"), "secret")
    assert welcome("x · Calotype", "http://h/", settings(), None) == "The demo of x is at http://h/ (Ctrl-C ends it)."


def test_a_port_in_use_is_named_and_the_next_free_one_found(monkeypatch):
    from calotype.demo import listening

    with listen("127.0.0.1", None) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot listen"):
            listen("127.0.0.1", port)
        monkeypatch.setattr(listening, "FIRST_PORT", port)
        with listen("127.0.0.1", None) as second:
            assert second.getsockname()[1] > port
    with pytest.raises(UserError, match="--host 192.0.2.1: cannot listen"):  # nobody's address
        listen("192.0.2.1", None)
