"""Thousands of spoiled command lines and settings files: each makes settings, or one sentence that names the fault."""

import importlib
import json
import time

import pytest
from hypothesis import HealthCheck, given, settings, strategies
from pydantic import BaseModel

from calotype import cli
from calotype.complaints import called, flag, is_positional
from calotype.errors import UserError

pytestmark = pytest.mark.reliability

# What a hand, a script or a cat on the keyboard gives in place of a value.
NUMBERS = [
    *("0 -0 -1 -5 1 2 3 2.5 1e308 1e400 -1e308 1e-400 nan inf -inf 0x10 1_000 1,5 ١٢ 007 +4 --4 4. 1e3 9e99".split()),
    *(str(10**k) for k in (6, 9, 18, 19, 30, 500)),
    *(str(2**k) for k in (15, 31, 32, 53, 63, 64)),
    "9" * 5000,
]
TEXTS = [
    *("None True false null [] {} shapes ../../etc /dev/null . .. ~ tiny kl fp32 superres:3 superres:999 a:b".split()),
    *("gaussian:nan mask:2 salt:-1 32x 0x32 32x32x32 99999x99999 1x1 8,5,,5 1 2,2 mask:0.5 8,8 plateau".split()),
    *(
        "",
        " ",
        "\n",
        "a\nb",
        "\x00",
        "a\x00b",
        "\x1b[31m",
        "é" * 300,
        "x" * 5000,
        "\udcff",
        "𝔘𝔫𝔦",
        "--",
        "-",
        "=",
        "%s%n",
    ),
]
VALUES = strategies.sampled_from(NUMBERS + TEXTS) | strategies.text(max_size=12) | strategies.integers().map(str)
JSON = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.text(max_size=12)
    | strategies.sampled_from([*NUMBERS[:40], *TEXTS, 10**400, 2**63, -(2**63), 1e308, "\ud800"]),
    lambda inner: (
        strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)
GARBAGE = [
    "",
    "{",
    "[" * 100_000,
    '{"a": 1',
    "\x00\x01",
    '{"steps": NaN}',
    '{"lr": 1e999}',
    "nul",
    '"steps"',
    "\ufeff{}",
]
LONGEST = 0.5  # seconds of the processor for one command line


def settings_class(command) -> type[BaseModel]:
    module, _, name = cli.COMMANDS[command][0].partition(":")
    return getattr(importlib.import_module(module), name)


def plain(cls):
    """The fewest words that make settings."""
    words, explorer = [], []
    for name, field in cls.model_fields.items():
        if field.is_required():
            value = "0.05" if field.annotation is float else "shapes"
            words += [value] if is_positional(cls, name) else [flag(name), value]
    return words + explorer


@strategies.composite
def spoiled(draw):
    """A command, its words, the content of its --config or None, and what was spoiled."""
    command = draw(strategies.sampled_from(sorted(cli.COMMANDS)))
    cls = settings_class(command)
    words, config, touched = plain(cls), None, []
    for _ in range(draw(strategies.integers(1, 3))):
        name = draw(strategies.sampled_from(sorted(cls.model_fields)))
        kind = draw(
            strategies.sampled_from(
                ["value", "fair", "fair", "fair", "fair", "typo", "bare", "drop", "more", "json", "json", "garbage"]
            )
        )
        touched.append(name)
        if kind in ("value", "fair"):
            value = draw(VALUES) if kind == "value" else draw(strategies.sampled_from(_fair(cls, name)))
            words += [f"{flag(name)}={value}"] if draw(strategies.booleans()) else [flag(name), value]
        elif kind == "typo":
            words += [_typo(draw, flag(name)), "3"]
            touched.append(words[-2])
        elif kind == "bare":
            words.append(flag(name))
        elif kind == "drop" and words:
            del words[draw(strategies.integers(0, len(words) - 1))]
        elif kind == "more":
            words.append(draw(VALUES))
            touched.append(words[-1])
        elif kind == "json":
            key = name if draw(strategies.booleans()) else draw(strategies.text(max_size=8))
            config = (config if isinstance(config, dict) else {}) | {key: draw(JSON)}
            touched.append(key)
        elif kind == "garbage":
            config = draw(strategies.sampled_from(GARBAGE))
    return command, words, config, touched


def _fair(cls, name):
    """Values that may well be right."""
    schema = cls.model_json_schema()["properties"][name]
    kinds = [schema, *schema.get("anyOf", [])]
    found = [str(value) for kind in kinds for value in kind.get("enum", [])]
    found += [str(kind[limit]) for kind in kinds for limit in ("minimum", "maximum", "default") if kind.get(limit)]
    return found or ["1", "0.5", "32", "none", "elsewhere"]


def _typo(draw, word):
    i = draw(strategies.integers(2, len(word) - 1))
    letter = draw(strategies.sampled_from("abxz-_ é"))
    return draw(
        strategies.sampled_from([word[:i] + word[i + 1 :], word[:i] + letter + word[i:], word[:i] + word[i:].upper()])
    )


def names_something(message, command, words):
    """Whether a message names a flag, a place, a word that was typed, or the settings file."""
    cls = settings_class(command)
    names = {called(cls, name) for name in cls.model_fields} | {flag(name) for name in cls.model_fields}
    names |= {
        "-- is no flag",
        "--config",
        "config.json",
        *(word.partition("=")[0][:60] for word in words if word.strip("-= ")),
    }
    return any(name in message for name in names)


def parsed(words):
    """Seconds of the processor, and what came of a line: settings, a refusal, or None for --help."""
    began = time.process_time()
    try:
        outcome = cli.settings_of(words)
    except SystemExit as stop:
        assert stop.code == 0
        outcome = None
    except UserError as error:
        outcome = error
    return time.process_time() - began, outcome


def test_spoiled_settings_make_settings_or_one_sentence(sized, tmp_path):
    file, took, refused = tmp_path / "config.json", [], [0]

    @settings(
        max_examples=sized(1000, 10_000),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(spoiled())
    def check(case):
        command, words, config, touched = case
        if config is not None:
            file.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
            words = [*words, "--config", str(file)]
        seconds, outcome = parsed([command, *words])
        if seconds > LONGEST:  # the collector of garbage may have come by: it is not the line's fault
            seconds = min(seconds, parsed([command, *words])[0])
        took.append((seconds, command, [word[:60] for word in words]))
        if isinstance(outcome, UserError):
            refused[0] += 1
            message = str(outcome)
            assert "\n" not in message and len(message) < 700, message
            assert names_something(message, command, words), (message, words, config, touched)
        elif outcome is not None:  # None where --help was among the words
            assert isinstance(outcome, settings_class(command))
            json.dumps(outcome.to_json())

    check()
    assert refused[0] > 500 and max(took)[0] <= LONGEST, (refused, max(took))
    print(f"{refused[0]} refusals of {len(took)}; the slowest took {max(took)[0]:.3f} s of the processor")
