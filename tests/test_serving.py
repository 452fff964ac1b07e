"""The server around the page: its headers, its health, its password, its several models, and how it ends."""

import asyncio
import re
import threading
from contextlib import suppress
from types import SimpleNamespace

import httpx
import pytest
from models import pipeline, tiny_unet

from calotype.demo import access, app
from calotype.demo.headers import HEADERS
from calotype.demo.leaving import Departures, Halt, gone, waited_for

gradio_client = pytest.importorskip("gradio_client", reason="the demo's server is NOT tested: gradio_client is missing")
PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models that know different labels, two of the same name."""
    places = [tmp_path_factory.mktemp("models") / title for title in ("prints", "sea side", "prints")]
    for place, label in zip(places, ("disc", "wave", "star"), strict=True):
        pipeline(tiny_unet(classes=1), id2label={"0": label}).save_pretrained(place / "pipeline")
    return places


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as environment:
        for name in (*app.ENVIRONMENT, "GRADIO_TEMP_DIR"):
            environment.setenv(name, "")  # so that what build() sets is undone
        yield


@pytest.fixture(scope="module")
def several(models, environment, tmp_path_factory):
    served = app.serve(app.build(models, str(tmp_path_factory.mktemp("temporary"))))
    yield served.url
    served.close()


@pytest.fixture(scope="module")
def locked(models, environment, tmp_path_factory):
    blocks = app.build(models[0], str(tmp_path_factory.mktemp("temporary")))
    served = app.serve(blocks, password=PASSWORD)
    yield served.url
    served.close()


# Several models


def test_models_are_chosen_by_name_and_by_nothing_else(several):
    config = httpx.get(f"{several}config").json()
    assert config["pages"][1:] == [["sea-side", "sea side", True], ["prints-2", "prints 2", True]]
    (navbar,) = [part["props"] for part in config["components"] if part["type"] == "navbar"]
    assert config["pages"][0][0] == "" and navbar["main_page_name"] == "prints"
    shown = {page: httpx.get(f"{several}{page}").text for page in ("", "sea-side", "prints-2")}
    for page, label in (("", "disc"), ("sea-side", "wave"), ("prints-2", "star")):
        assert [name for name in ("disc", "wave", "star") if f'"{name}"' in shown[page]] == [label]
    for other in ("../prints", "models", "org%2fmodel", "..%2f..%2fetc"):
        assert httpx.get(f"{several}{other}").status_code == 404


def test_each_model_draws_its_own_labels(several, tmp_path):
    client = gradio_client.Client(several, verbose=False, analytics_enabled=False, download_files=str(tmp_path))
    for i, label in enumerate(("disc", "wave", "star")):
        *_, note, _ = client.predict(label=label, count=1, steps=1, api_name="/generate" + f"_{i}" * (i > 0))
        assert note.startswith("Seed ")
    with pytest.raises(gradio_client.exceptions.AppError):
        client.predict(label="wave", count=1, steps=1, api_name="/generate")
    client.close()


# Health and headers


def test_health_and_headers(several):
    assert httpx.get(f"{several}healthz").text == "alive" and httpx.get(f"{several}readyz").text == "ready"
    for path in ("", "healthz", "nothing", "gradio_api/file=/etc/passwd"):
        headers = httpx.get(f"{several}{path}").headers
        assert HEADERS.items() <= dict(headers).items() and "server" not in headers
    assert "access-control-allow-origin" not in httpx.get(several, headers={"origin": "https://evil.example"}).headers


def test_the_limits_are_what_the_server_says(several):
    config = httpx.get(f"{several}config").json()
    assert config["max_file_size"] == 8 * 2**20 and config["show_error"] is False and config["run_history"] is False
    assert config["analytics_enabled"] is False and config["footer_links"] == [] and config["mcp_server"] is False


# The password


def test_without_the_password_there_is_nothing_to_see(locked):
    assert httpx.get(f"{locked}healthz").text == "alive" and httpx.get(f"{locked}readyz").text == "ready"
    order = {"data": [], "fn_index": 0, "session_hash": "a", "event_id": "a", "component_id": 1, "fn_name": "x"}
    answers = [httpx.get(f"{locked}{path}") for path in ("", "config", "theme.css", "gradio_api/info", "assets/a.js")]
    answers += [httpx.get(f"{locked}gradio_api/{path}") for path in ("queue/data?session_hash=a", "heartbeat/a")]
    paths = ("queue/join", "run/order", "component_server", "call/generate", "cancel", "reset")
    answers += [httpx.post(f"{locked}gradio_api/{path}", json=order) for path in paths]
    answers += [httpx.post(f"{locked}gradio_api/upload", files={"files": ("a.png", b"a")})]
    for answer in answers:
        assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic ")
        assert HEADERS.items() <= dict(answer.headers).items() and "disc" not in answer.text


def test_the_password_opens_and_wrong_ones_are_told_late(locked, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(access, "asyncio", SimpleNamespace(sleep=sleep))
    right = (access.USER, PASSWORD)
    assert httpx.get(f"{locked}config", auth=right).json()["title"] == "prints · Calotype" and waits == []
    wrong = [{"auth": pair} for pair in ((access.USER, PASSWORD[:-1]), ("admin", PASSWORD), ("", ""), right[::-1])]
    wrong += [{"headers": {"authorization": words}} for words in ("Basic", "Basic !!!", "Bearer a", "Basic w6Q=")]
    for attempt in wrong:
        assert httpx.get(f"{locked}config", **attempt).status_code == 401, attempt
    assert waits == [access.WAIT] * len(wrong)


def test_a_client_with_the_password_draws(locked, tmp_path):
    way = {"httpx_kwargs": {"auth": (access.USER, PASSWORD)}, "analytics_enabled": False, "verbose": False}
    client = gradio_client.Client(locked, download_files=str(tmp_path), **way)
    *_, note, _ = client.predict(label="disc", count=1, steps=1, api_name="/generate")
    assert note.startswith("Seed ")
    client.close()


# How it ends


def test_the_server_ends_while_somebody_listens(models, environment, tmp_path):
    served = app.serve(app.build(models[0], str(tmp_path)))
    opened = threading.Event()

    def listen():
        address = f"{served.url}gradio_api/heartbeat/a"
        with suppress(httpx.TransportError), httpx.stream("GET", address, timeout=60) as answer:
            for _ in answer.iter_lines():
                opened.set()

    threading.Thread(target=listen, daemon=True).start()
    assert opened.wait(60)
    served.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}healthz")


# Who has gone


def test_only_those_who_are_under_way_are_halted(monkeypatch):
    from gradio.context import LocalContext

    class Request:
        session_hash = "mine"

    halt, other = Halt(), Halt()
    token = LocalContext.request.set(Request())
    try:
        with waited_for(halt):
            gone("theirs")
            assert not halt.wanted
            gone("mine")
            assert halt.wanted
        with waited_for(other):
            pass
        gone("mine")
        assert not other.wanted
    finally:
        LocalContext.request.reset(token)


@pytest.mark.parametrize("breaks_off", [True, False])
def test_an_answer_that_breaks_off_is_noticed(breaks_off):
    from gradio.context import LocalContext

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if breaks_off:
            raise asyncio.CancelledError
        await send({"type": "http.response.body", "body": b"all"})

    async def nothing(message=None):
        return {"type": "http.request"}

    halt, scope = Halt(), {"type": "http", "method": "GET", "path": "/gradio_api/queue/data"}
    LocalContext.request.set(type("Request", (), {"session_hash": "s"}))
    with waited_for(halt):
        try:
            asyncio.run(Departures(answer)(scope | {"query_string": b"session_hash=s"}, nothing, nothing))
        except asyncio.CancelledError:
            assert breaks_off
    LocalContext.request.set(None)
    assert halt.wanted is breaks_off


def test_an_error_of_our_own_is_a_number_in_the_log(caplog):
    import gradio as gr

    from calotype.demo.parts import for_visitors

    with pytest.raises(gr.Error) as told, for_visitors():
        raise OSError(2, "No such file", "/home/somebody/secret")
    number = re.search(r"error ([0-9a-f]{8}) in its log", told.value.message).group(1)
    assert "secret" not in told.value.message and number in caplog.text and "/home/somebody/secret" in caplog.text
