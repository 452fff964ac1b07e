"""What may differ when a run is resumed: each setting of a training command says so beside its type."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel

from calotype.complaints import called, shown
from calotype.errors import UserError

T = TypeVar("T")


class Change(Enum):
    """What becomes of a resumed run that is given another value of a setting."""

    FREE = "free"  # it goes on to the same bits: where things lie, how much is kept and said
    ALLOWED = "allowed"  # it goes on in another way, which is announced and written down
    REFUSED = "refused"  # it would be another run: architecture, objective, data, seed


Free = Annotated[T, Change.FREE]
Allowed = Annotated[T, Change.ALLOWED]
Fixed = Annotated[T, Change.REFUSED]


class Changed(NamedTuple):
    """A setting that differs from the one that a run was started with."""

    name: str  # as it is given: --lr
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} {_value(self.was)} -> {_value(self.now)}"


def change_of(cls: type[BaseModel], name: str) -> Change:
    """Whether a setting may change; a command that trains must say it of each, or this raises LookupError."""
    found = [mark for mark in cls.model_fields[name].metadata if isinstance(mark, Change)]
    if len(found) != 1:
        raise LookupError(f"{cls.__name__}.{name} must be one of Free, Allowed and Fixed, not {found}")
    return found[0]


def changes_since(settings: Any, file: Path) -> dict[str, Changed]:
    """The allowed changes, by field, since the run whose config.json is `file`; raises UserError for one that is not.

    A field that is younger than the run counts as having had its default.
    """
    cls, now = type(settings), settings.to_json()
    then = {name: field.get_default(call_default_factory=True) for name, field in cls.model_fields.items()}
    then |= read_config(file)
    found = {}
    for name, value in now.items():
        change = change_of(cls, name)
        if change is Change.FREE or then[name] == value:
            continue
        if change is Change.REFUSED:
            raise UserError(
                f"--out {file.parent} holds a run with {called(cls, name)} {_value(then[name])}, not {_value(value)}; "
                "give that value, another --out, or --fresh to begin again."
            )
        found[name] = Changed(called(cls, name), then[name], value)
    return found


def read_config(file: Path) -> dict[str, Any]:
    """What a run's config.json holds; raises UserError where it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return dict(found.items())
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{file} is damaged; put it back, or give --fresh to begin again.") from None


def goes_further(settings: Any, done: dict[str, Any]) -> bool:
    """Whether a finished run of that many `steps` and `seconds` has more to do with these settings."""
    shares = [done["steps"] / settings.length] if settings.length else []
    shares += [done["seconds"] / (60 * settings.max_minutes)] if settings.max_minutes else []
    return max(shares, default=1.0) < 1


def comes_too_late(out: Path, changes: dict[str, Changed]) -> UserError:
    """The refusal of changes that come after the end."""
    change = next(iter(changes.values()))
    return UserError(
        f"--out {out} is a finished run with {change.name} {_value(change.was)}, not {_value(change.now)}; give that "
        "value, more --steps or --max-minutes to go on, another --out, or --fresh to begin again."
    )


def _value(value: Any) -> str:
    return "by default" if value is None else shown(value)
