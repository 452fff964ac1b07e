"""Who may come in: a password for a page that others can reach."""

import asyncio
import base64
import hmac
import logging
import secrets
from pathlib import Path

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from calotype.errors import UserError

USER = "calotype"
SHORTEST = 8  # characters of a password that somebody chose
_OPEN = {"/healthz", "/readyz"}
WAIT = 1.0  # seconds before a wrong password is told so


def password_for(public: bool, no_auth: bool, file: Path | None) -> str | None:
    """The password that the page asks for, None where it asks for none; a new one each time unless a file holds one.

    Raises UserError for a file that cannot be read or holds too little.
    """
    if file is not None:
        return read_password(file)
    return secrets.token_urlsafe(12) if public and not no_auth else None


def read_password(file: Path) -> str:
    """The first line of a file; raises UserError."""
    try:
        password = file.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"--password-file {file} cannot be read ({reason}); name one with a password in it.") from None
    if len(password) < SHORTEST:
        raise UserError(
            f"--password-file {file}: its first line has {len(password)} characters; choose at least {SHORTEST}, "
            "or leave the flag out for a random password."
        )
    return password


class Lock:
    """An ASGI middleware that asks for a name and a password before anything but the server's health is told.

    This is HTTP's own way (Basic), which covers every address: Gradio's page for logging in tells the API to anybody.
    """

    def __init__(self, app: ASGIApp, password: str):
        self.app, self._key = app, f"{USER}:{password}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        given = dict(scope.get("headers", ())).get(b"authorization")
        if scope["type"] != "http" or scope["path"] in _OPEN or (given is not None and self._fits(given)):
            await self.app(scope, receive, send)
            return
        if given is not None:
            logging.getLogger(__name__).warning("a wrong password was given")
            await asyncio.sleep(WAIT)
        asks = {"www-authenticate": 'Basic realm="Calotype", charset="UTF-8"'}
        await PlainTextResponse("This page asks for a name and a password.", 401, asks)(scope, receive, send)

    def _fits(self, given: bytes) -> bool:
        kind, _, words = given.partition(b" ")
        try:
            key = base64.b64decode(words, validate=True)
        except ValueError:
            return False
        return kind.lower() == b"basic" and hmac.compare_digest(key, self._key)
