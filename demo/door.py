"""What stands before Gradio: bodies that are too large stay out, and who finds the queue full hears when to return."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
RETRY_AFTER = 5  # seconds


class TooLarge(Exception):
    """A body that goes on beyond the limit."""


class Door:
    """An ASGI middleware: 413 beyond `most_bytes`, Retry-After beside every 503."""

    def __init__(self, app, most_bytes: int):
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = _Visit(receive, send, self.most_bytes)
        if _declared_length(scope) > self.most_bytes:
            await visit.refuse()
            return
        try:
            await self.app(scope, visit.receive, visit.send)
        except TooLarge:
            await visit.refuse()


class _Visit:
    """One request on its way in and its answer on its way out."""

    def __init__(self, receive: Receive, send: Send, most_bytes: int):
        self._receive, self._send, self.left = receive, send, most_bytes
        self.answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise TooLarge
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.answered = True
            if message["status"] == 503:
                message["headers"] = [*message.get("headers", []), (b"retry-after", str(RETRY_AFTER).encode())]
        await self._send(message)

    async def refuse(self) -> None:
        if self.answered:
            return
        text = b"This is larger than the server takes."
        headers = {b"content-type": b"text/plain", b"content-length": str(len(text)).encode(), b"connection": b"close"}
        await self._send({"type": "http.response.start", "status": 413, "headers": list(headers.items())})
        await self._send({"type": "http.response.body", "body": text})


def _declared_length(scope) -> int:
    """The length of a body in bytes as its sender says it; 0 where it says nothing that is a number."""
    value = dict(scope["headers"]).get(b"content-length", b"")
    return int(value) if value.isdigit() else 0
