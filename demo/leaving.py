"""Who has gone: a drawing that nobody waits for any more ends at its next step."""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs

from gradio.context import LocalContext
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_API = "/gradio_api"


class Halt:
    """Whether the drawing under way is to stop; each visitor has one of these."""

    def __init__(self):
        self.wanted = False


_UNDER_WAY: dict[str, list[Halt]] = defaultdict(list)  # by session


@contextmanager
def waited_for(halt: Halt) -> Iterator[None]:
    """While this lasts, the halt is wanted as soon as the visitor who is served has gone."""
    request = LocalContext.request.get(None)
    session = None if request is None else request.session_hash
    if session is None:
        yield
        return
    _UNDER_WAY[session].append(halt)
    try:
        yield
    finally:
        _UNDER_WAY[session].remove(halt)
        if not _UNDER_WAY[session]:
            del _UNDER_WAY[session]


def gone(session: str) -> None:
    """Nobody waits for what this session asked for."""
    for halt in list(_UNDER_WAY.get(session, [])):
        halt.wanted = True


class Departures:
    """An ASGI middleware that sees visitors cancel, and answers break off that they were reading.

    Gradio sees it too, but only when a function yields, and to yield at every step takes longer than many a step.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = scope.get("path", "")
        if scope["type"] == "http" and scope["method"] == "POST" and path.rstrip("/") == f"{_API}/cancel":
            await self.app(scope, _cancelling(receive), send)
        elif scope["type"] == "http" and (session := _session(path, scope["query_string"])):
            await self._read(session, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _read(self, session: str, scope: Scope, receive: Receive, send: Send) -> None:
        whole = False

        async def heard() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not whole:
                gone(session)
            return message

        async def answered(message: Message) -> None:
            nonlocal whole
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, heard, answered)
        finally:
            if not whole:
                gone(session)


def _session(path: str, query: bytes) -> str | None:
    """Whose results are read at this address."""
    if path.rstrip("/") == f"{_API}/queue/data":
        return parse_qs(query.decode("latin-1")).get("session_hash", [None])[0]
    if path.startswith(f"{_API}/call/"):
        return path.rstrip("/").rpartition("/")[2]
    return None


def _cancelling(receive: Receive) -> Receive:
    """The body as it comes; once it is whole, its session is gone."""
    body = b""

    async def heard() -> Message:
        nonlocal body
        message = await receive()
        body += message.get("body", b"")
        if message["type"] == "http.request" and not message.get("more_body", False):
            gone(_named(body))
        return message

    return heard


def _named(body: bytes) -> str:
    try:
        return str(json.loads(body)["session_hash"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
