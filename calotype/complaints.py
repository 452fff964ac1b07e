"""What is wrong with a flag or with a line of a settings file: one sentence that names it and a way out."""

import difflib
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined
from tyro.conf import Positional

from calotype.errors import one_line

_MOST = 80  # characters of a value that are repeated
_POSITIONAL = Positional[int].__metadata__[0]
# What pydantic found -> what must be.
_MUST = {
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number with fewer digits",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "multiple_of": "must be a multiple of {multiple_of}",
    "literal_error": "must be {expected}",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "string_unicode": "must be text in UTF-8",
    "path_type": "must be a path",
    "tuple_type": "must be a list",
    "missing": "needs another value",
    "too_long": "has too many values",
    "too_short": "needs a value",
    "string_pattern_mismatch": "has the wrong form",
}


def flag(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def called(cls: type[BaseModel], name: str) -> str:
    """A setting as it is given: `--batch-size`, `-n`, or `SOURCE` where it goes by its place."""
    for mark in cls.model_fields[name].metadata:
        if getattr(mark, "metavar", None) and is_positional(cls, name):
            return mark.metavar.split()[0]
        if getattr(mark, "aliases", None):
            return mark.aliases[0]
    return flag(name)


def is_positional(cls: type[BaseModel], name: str) -> bool:
    """Whether a setting is given by its place and without a flag."""
    return _POSITIONAL in cls.model_fields[name].metadata


def shown(value: Any) -> str:
    """A value in one line, and not too much of it."""
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    text = text if text.isprintable() and text else repr(text)
    return text if len(text) <= _MOST else f"{text[: _MOST - 1]}…"


def describe(error: ValidationError, cls: type[BaseModel], only: set[str] | None = None) -> str | None:
    """The first complaint of a pydantic error (about a field in `only`), with the flag, the value and a way out."""
    for found in error.errors():
        name = str(found["loc"][0]) if found["loc"] else None
        if name is None:
            return one_line(found["msg"].removeprefix("Value error, "))
        if name in cls.model_fields and (only is None or name in only):
            return f"{called(cls, name)} {shown(found['input'])} {_must(found)}; {way_out(cls, name)}"
    return None


def way_out(cls: type[BaseModel], name: str) -> str:
    """What to give instead."""
    field = cls.model_fields[name]
    about = f": {field.description}" if "(" in str(field.description) else f" ({field.description})"
    if field.default is None:
        return f"give {_kind(field.annotation)}, or leave it out{about}."
    if field.default is PydanticUndefined or field.default == ():
        return f"give one{about}."
    return f"try {shown(field.default)}{about}."


def about_words(cls: type[BaseModel], argv: list[str], prog: str, filled: dict[str, Any]) -> str | None:
    """What is wrong with the words of a command line, or None; `filled` holds what is known without them.

    Flags that are none come first, then values that are missing or wrong, then what was not given at all.
    """
    given, loose, complaint = _sorted(cls, argv, prog)
    if complaint:
        return complaint
    placed, more = _placed(cls, loose)
    if more:
        return f"{shown(more[0])} is one word too many; {_places(cls)}."
    given |= placed
    try:
        cls.model_validate({name: example(cls, name) for name in cls.model_fields if is_required(cls, name)} | given)
    except ValidationError as error:
        if complaint := describe(error, cls, set(given)):
            return complaint
    missing = next((n for n in cls.model_fields if is_required(cls, n) and n not in filled | given), None)
    if missing:
        return f"{called(cls, missing)} is missing; give one ({cls.model_fields[missing].description})."
    many = next((name for name in placed if _takes_many(cls, name)), None)
    return many and f"{called(cls, many)} {shown(loose[-1])} stands apart; give all of them together, before the flags."


def hopeless_word(cls: type[BaseModel], argv: list[str], prog: str) -> str | None:
    """The complaint about a path or source that is empty, as an unset variable of a shell is, or about an endless flag.

    A parser of command lines takes the one for the folder it is in, and compares the other with every flag for seconds.
    """
    given, loose, complaint = _sorted(cls, argv, prog)
    if complaint and any(_is_flag(word) and len(word.partition("=")[0]) > _MOST for word in argv):
        return complaint
    for name, value in (given | _placed(cls, loose)[0]).items():
        if (value == "" or (isinstance(value, list) and "" in value)) and is_required(cls, name) | (
            Path in _members(cls.model_fields[name].annotation)
        ):
            return f"{called(cls, name)} is empty; {way_out(cls, name)}"
    return None


def is_required(cls: type[BaseModel], name: str) -> bool:
    """Whether a setting has no default."""
    return cls.model_fields[name].is_required()


def example(cls: type[BaseModel], name: str) -> Any:
    """Something valid for a required setting that is not known yet."""
    return 0.1 if cls.model_fields[name].annotation is float else "-"


def _sorted(cls: type[BaseModel], argv: list[str], prog: str) -> tuple[dict[str, Any], list[str], str | None]:
    """The words as values by field, those without a flag, and the first complaint."""
    fields = {called(cls, n): n for n in cls.model_fields} | {flag(n): n for n in cls.model_fields}
    fields = {word: name for word, name in fields.items() if word.startswith("-") and not is_positional(cls, name)}
    given, loose, words = {}, [], list(argv)
    while words:
        word, equals, value = words.pop(0).partition("=")
        name = fields.get(word if word in fields else word.replace("_", "-"))
        if name is None and not _is_flag(word):
            loose.append(word + equals + value)
        elif name is None:
            close = difflib.get_close_matches(word[:_MOST], fields, n=1)
            return (
                given,
                loose,
                f"{shown(word)} is no flag of {prog}; "
                + (f"did you mean {close[0]}?" if close else f"{prog} --help lists them."),
            )
        elif cls.model_fields[name].annotation is bool:
            if equals:
                return given, loose, f"{word} takes no value; leave out ={shown(value)}."
            given[name] = True
        else:
            found = [value] if equals else _values(cls, name, words)
            if not found:
                return given, loose, f"{word} needs a value; {way_out(cls, name)}"
            given[name] = found if _takes_many(cls, name) else found[0]
    return given, loose, None


def _placed(cls: type[BaseModel], loose: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Words without a flag by the field whose place they take, and those that are too many."""
    found: dict[str, Any] = {}
    for name in cls.model_fields:
        if is_positional(cls, name) and loose:
            count = len(loose) if _takes_many(cls, name) else 1
            found[name] = loose[:count] if _takes_many(cls, name) else loose[0]
            loose = loose[count:]
    return found, loose


def _places(cls: type[BaseModel]) -> str:
    """What to do with a word that has no place."""
    names = [called(cls, name) for name in cls.model_fields if is_positional(cls, name)]
    where = f"only {' '.join(names)} has none" if names else f"such as {called(cls, next(iter(cls.model_fields)))}"
    return f"leave it out, or give its flag before it, {where}"


def _values(cls: type[BaseModel], name: str, words: list[str]) -> list[str]:
    """Takes the values of a flag from the words behind it."""
    found = []
    while words and not _is_flag(words[0]) and (not found or _takes_many(cls, name)):
        found.append(words.pop(0))
    return found


def _takes_many(cls: type[BaseModel], name: str) -> bool:
    return get_origin(cls.model_fields[name].annotation) is tuple


def _is_flag(word: str) -> bool:
    """Whether a word is meant as a flag; -3 and -1e5 are numbers."""
    if not word.startswith("-") or word == "-":
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def unknown_key(name: str, cls: type[BaseModel]) -> str:
    """What to do about a key of a settings file that is none."""
    close = difflib.get_close_matches(name[:_MOST], cls.model_fields, n=1)
    return f"did you mean {close[0]!r}?" if close else "remove it."


def _must(found: dict[str, Any]) -> str:
    words = _MUST.get(found["type"])
    if words:
        return words.format(**{name: _limit(value) for name, value in found.get("ctx", {}).items()})
    message = found["msg"].removeprefix("Value error, ")
    return " ".join(f"{message[0].lower()}{message[1:]}".split())


def _limit(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else _unquoted(value)


def _unquoted(value: Any) -> str:
    return str(value).replace("'", "")


def _kind(annotation: Any) -> str:
    """What values of a type are called."""
    kinds = [kind for kind in _members(annotation) if kind is not type(None)]
    if kinds and get_origin(kinds[0]) is Literal:
        return "one of these"
    return {int: "a whole number", float: "a number", Path: "a path"}.get(kinds[0] if kinds else None, "another")


def _members(annotation: Any) -> tuple[Any, ...]:
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(get_args(part)[0] if get_origin(part) is Annotated else part for part in parts)
