"""What stands before Gradio: bodies that are too large stay out, and who finds the queue full hears when to return."""

import logging
from collections.abc import Callable

import anyio.to_thread
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

RETRY_AFTER = 5  # seconds
_NONSENSE = "There is no such function, or it takes other arguments."
_TOO_LARGE = "This is larger than the server takes."


class Door:
    """An ASGI middleware: 413 for too large a body, Retry-After beside every 503, 400 where `nonsense` is raised.

    Files may have `most_bytes`, and `make_room(most_bytes)` is called before any; other bodies may have `most_words`.
    Functions of the page run in its queue and not in a request: an error in one is about the request alone.
    """

    def __init__(
        self,
        app: ASGIApp,
        most_bytes: int,
        most_words: int,
        make_room: Callable[[int], object],
        nonsense: tuple[type[Exception], ...] = (KeyError, ValueError, RecursionError),
    ):
        self.app, self.most_bytes, self.most_words, self.make_room = app, most_bytes, most_words, make_room
        self.nonsense = nonsense

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        brings_files = headers.get(b"content-type", b"").lower().startswith(b"multipart/form-data")
        most = self.most_bytes if brings_files else self.most_words
        if _declared_length(headers) > most:
            await PlainTextResponse(_TOO_LARGE, 413, {"connection": "close"})(scope, receive, send)
            return
        if brings_files:
            await anyio.to_thread.run_sync(self.make_room, most)
        await self._let_in(scope, _counted(receive, most), _with_retry_after(send))

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        answered = False

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except self.nonsense as error:
            if answered or scope["method"] != "POST":
                raise
            logging.getLogger(__name__).warning("%s refused: %.200r", scope["path"], error)
            await PlainTextResponse(_NONSENSE, 400)(scope, receive, send)


def _counted(receive: Receive, most: int) -> Receive:
    """For bodies that come in pieces of which nobody has said how many."""
    left = most

    async def counted() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return counted


def _with_retry_after(send: Send) -> Send:
    async def answered(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 503:
            message["headers"] = [*message.get("headers", []), (b"retry-after", str(RETRY_AFTER).encode())]
        await send(message)

    return answered


def _declared_length(headers: dict[bytes, bytes]) -> int:
    """The length of a body in bytes as its sender says it; 0 where it says nothing that is a number."""
    value = headers.get(b"content-length", b"")
    return int(value) if value.isdigit() and len(value) < 20 else 0
