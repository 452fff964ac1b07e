"""Errors that are meant for a person's eyes."""

import errno

_LONGEST = 300  # characters of a word that are shown


class UserError(ValueError):
    """A one-line message that names the flag or file, the value and the way out; the command line exits with 2."""


def one_line(text: str) -> str:
    """A message as one line that a terminal shows as it is: long names are cut, control characters are spelled out."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)
    return " ".join(word if len(word) <= _LONGEST else f"{word[:_LONGEST]}…" for word in text.split())


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk is full: Python says so by errno, safetensors only in its text."""
    codes = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")} - {None}
    texts = ("No space left", "os error 28", "os error 27", "File too large")
    return getattr(error, "errno", None) in codes or any(text in str(error) for text in texts)
