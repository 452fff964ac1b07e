"""What stands before Gradio: bodies that are too large stay out, and who finds the queue full hears when to return."""

import logging

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

RETRY_AFTER = 5  # seconds
_NONSENSE = "There is no such function, or it takes other arguments."
_TOO_LARGE = "This is larger than the server takes."


class Door:
    """An ASGI middleware: 413 beyond `most_bytes`, Retry-After beside every 503, 400 for what Gradio trips over.

    Functions of the page run in its queue and not in a request: an error in one is about the request alone.
    """

    def __init__(self, app: ASGIApp, most_bytes: int):
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif _declared_length(scope) > self.most_bytes:
            await PlainTextResponse(_TOO_LARGE, 413, {"connection": "close"})(scope, receive, send)
        else:
            await self._let_in(scope, self._counted(receive), _with_retry_after(send))

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        answered = False

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except (KeyError, ValueError) as error:
            if answered or scope["method"] != "POST":
                raise
            logging.getLogger(__name__).warning("%s refused: %r", scope["path"], error)
            await PlainTextResponse(_NONSENSE, 400)(scope, receive, send)

    def _counted(self, receive: Receive) -> Receive:
        """For bodies that come in pieces of which nobody has said how many."""
        left = self.most_bytes

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


def _declared_length(scope: Scope) -> int:
    """The length of a body in bytes as its sender says it; 0 where it says nothing that is a number."""
    value = dict(scope["headers"]).get(b"content-length", b"")
    return int(value) if value.isdigit() else 0
