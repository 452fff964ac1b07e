"""Errors that are meant for a person's eyes."""

import errno


class UserError(ValueError):
    """A one-line message that names the flag or file, the value and the way out; the command line exits with 2."""


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk is full: Python says so by errno, safetensors only in its text."""
    codes = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")} - {None}
    texts = ("No space left", "os error 28", "os error 27", "File too large")
    return getattr(error, "errno", None) in codes or any(text in str(error) for text in texts)
