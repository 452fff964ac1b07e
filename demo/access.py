"""Who may come in: a password for a page that others can reach."""

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

from calotype.errors import UserError

USER = "calotype"
SHORTEST = 8  # characters of a password that somebody chose
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


def checker(password: str) -> Callable[[str, str], Awaitable[bool]]:
    """What Gradio asks whether a name and a password may come in; a wrong one is answered late."""

    async def check(name: str, given: str) -> bool:
        right = hmac.compare_digest(f"{name}\0{given}".encode(), f"{USER}\0{password}".encode())
        if not right:
            logging.getLogger(__name__).warning("a wrong password was given")
            await asyncio.sleep(WAIT)
        return right

    return check
