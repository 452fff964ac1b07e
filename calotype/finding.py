"""What an examination of this machine finds: a row of `calotype doctor`'s table."""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

Verdict = Literal["pass", "note", "FAIL"]
_LONGEST = 300


class Finding(NamedTuple):
    """One row: what was examined, the verdict, what was found, and the way out where there is something to do."""

    what: str
    verdict: Verdict
    found: str
    way_out: str = ""


def examine(what: str, examination: Callable[[], Finding | Iterable[Finding]]) -> list[Finding]:
    """The findings of an examination; whatever it raises is a finding too, in one line."""
    try:
        found = examination()
        return [found] if isinstance(found, Finding) else list(found)
    except Exception as error:  # a sick machine fails in ways that nobody foresaw
        return [Finding(what, "FAIL", in_one_line(error), "This came unexpectedly; the message above is all there is.")]


def in_one_line(error: BaseException | str) -> str:
    """The message of an error, or its kind where it has none, without line breaks."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    kind = type(error).__name__ if isinstance(error, BaseException) else "no message"
    return (text or kind)[:_LONGEST]
