"""Settings: pydantic models <-> command-line flags <-> config.json; presets."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from calotype.errors import UserError

Preset = Literal["tiny", "small", "base", "large"]
PRESET_IMAGE_SIZE = {"tiny": "32", "small": "64", "base": "128", "large": "256"}
T = TypeVar("T")
# A setting that need not be given; its description says what happens then.
Maybe = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]
ImageSize = Annotated[str, Field(pattern=r"^[1-9]\d*(x[1-9]\d*)?$")]

_ONCE = {"fresh", "resume"}
_MARKERS = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
_BOX = re.compile(r"[╭╮╰╯│─]+")
_TAIL = re.compile(r"(Argument helptext:|For full helptext|Perhaps you meant:\s*$).*")


class Settings(BaseModel):
    """The settings of one command: frozen, typed, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    # What may differ when a run is resumed; everything else belongs to the run's identity.
    FREE: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _resume_or_fresh(self) -> Self:
        if getattr(self, "resume", False) and getattr(self, "fresh", False):
            raise ValueError("--resume and --fresh exclude each other; give one of them.")
        return self

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values, without what is said for one call only."""
        return self.model_dump(mode="json", exclude=_ONCE)


class DataSettings(Settings):
    """Where pictures come from and how they are prepared; what is not given is as the data sheet says."""

    image_size: Maybe[ImageSize] = Field(None, description="side in pixels, or HEIGHTxWIDTH (default: by preset)")
    fit: Maybe[Literal["crop", "pad", "stretch"]] = Field(None, description="way to that size (default: crop)")
    channels: Maybe[Literal[1, 3]] = Field(None, description="grey or colour (default: as the pictures are)")
    val: Maybe[str] = Field(None, description="held out: a folder, or a fraction by hash of the path (default: 0.05)")
    allow_bad: bool = Field(False, description="go on even if more than 1 in 100 files is unreadable")

    @model_validator(mode="after")
    def _val_is_a_folder_or_a_fraction(self) -> Self:
        fraction = fraction_of(self.val)
        if fraction is not None and not 0 < fraction < 1:
            raise ValueError(f"--val {self.val} must be a folder or a fraction between 0 and 1; try --val 0.05.")
        return self


class TrainSettings(Settings):
    """What every training command shares."""

    FREE: ClassVar[frozenset[str]] = frozenset(
        [
            "out",
            "preset",
            "source",
            "resume",
            "fresh",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "workers",
            "trackers",
        ]
    )
    LENGTHS: ClassVar[dict[str, int]] = {}

    out: Path = Field(description="folder of this stage")
    preset: Preset = Field("tiny", description="the one dial for width, batch, learning rate and length")
    steps: Maybe[int] = Field(None, ge=0, description="optimiser steps (default: by preset, unless --max-minutes)")
    max_minutes: Maybe[float] = Field(None, gt=0, description="stop after this time; the schedule follows the clock")
    batch_size: int = Field(64, ge=1, description="examples of one optimiser step, over all processes")
    micro_batches: int = Field(1, ge=1, description="parts in which a process walks through its share")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    lr_schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    warmup_steps: int = Field(50, ge=0, description="steps of linear warm-up")
    optimizer: Literal["adamw", "muon", "sgd"] = Field(
        "adamw", description="muon is for matrices, with AdamW for the rest; sgd is plain descent, for comparisons"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    seed: int = Field(0, ge=0, description="with it and the settings everything random is fixed")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is good at it")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints that are kept")
    validations: int = Field(8, ge=1, description="validations and sample sheets over the run")
    log_every: int = Field(10, ge=1, description="steps whose mean makes one line of metrics.jsonl")
    trackers: tuple[str, ...] = Field((), description="accelerate trackers, such as tensorboard")
    resume: bool = Field(False, description="insist that there is something to go on from")
    fresh: bool = Field(False, description="throw away what --out holds and begin again")

    @property
    def length(self) -> int | None:
        """Optimiser steps of the run; None where only the clock ends it."""
        if self.steps is None and self.max_minutes is None:
            return self.LENGTHS[self.preset]
        return self.steps


def fraction_of(val: str | None) -> float | None:
    """The number that `--val` holds, or None where it names a folder or was not given."""
    try:
        return float(val or "")
    except ValueError:
        return None


def height_width(image_size: str) -> tuple[int, int]:
    """`"32"` -> (32, 32); `"32x48"` -> (32, 48)."""
    height, _, width = image_size.partition("x")
    return int(height), int(width or height)


def parse(cls: type[Settings], argv: list[str], prog: str) -> Settings:
    """Settings from flags, over those of `--config FILE`, over the preset; raises UserError in one line."""
    argv, config_file = _take(argv, "--config")
    given = read_settings(cls, Path(config_file)) if config_file else {}
    _, preset = _take(argv, "--preset")
    if preset and preset != given.get("preset", preset):  # the flag wins over the file, with all that it stands for
        given = {name: value for name, value in given.items() if name not in cls.PRESETS.get(preset, {})}
    preset = preset or given.get("preset", "tiny")
    required = {name: tyro.MISSING for name, field in cls.model_fields.items() if field.is_required()}
    default = cls.model_construct(**required | cls.PRESETS.get(preset, {}) | given)
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            description = f"{cls.__doc__} --config FILE gives settings too; flags win over it."
            return tyro.cli(cls, args=argv, prog=prog, description=description, default=default, config=_MARKERS)
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise UserError(_one_line(stop, messages.getvalue(), prog)) from None


def read_settings(cls: type[Settings], file: Path) -> dict[str, Any]:
    """Validated values of a settings file; raises UserError naming the file and the key."""
    try:
        given = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"--config {file} cannot be read ({error.strerror}); give the config.json of a run.") from None
    except ValueError as error:
        raise UserError(f"--config {file} is not JSON ({error}).") from None
    if not isinstance(given, dict):
        raise UserError(f"--config {file} holds no settings; give the config.json of a run.")
    unknown = sorted(set(given) - set(cls.model_fields))
    if unknown:
        raise UserError(f"{file}: unknown key {unknown[0]!r}; {_did_you_mean(unknown[0], cls)}")
    try:
        checked = cls.model_validate(_complete(cls, given))
    except ValidationError as error:
        raise UserError(f"{file}: {describe(error)}") from None
    return {name: getattr(checked, name) for name in given if name not in _ONCE}


def refuse_other_settings(settings: Settings, file: Path) -> None:
    """Raise UserError if the run whose config.json is `file` was started with other settings that matter."""
    then, now = json.loads(file.read_text()), settings.to_json()
    for name in now:
        if name not in settings.FREE and then.get(name) != now[name]:
            raise UserError(
                f"--out {file.parent} holds a run with {flag(name)} {then.get(name)}, not {now[name]}; "
                "give that value, another --out, or --fresh to begin again."
            )


def describe(error: ValidationError) -> str:
    """The first complaint of a pydantic error, with the flag and the value, in one line."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    return f"{flag(str(first['loc'][0]))} {first['input']}: {message[0].lower()}{message[1:]}."


def flag(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def _complete(cls: type[Settings], given: dict[str, Any]) -> dict[str, Any]:
    """The given values, and something valid for required fields that the file leaves to the command line."""
    return {name: "" for name, field in cls.model_fields.items() if field.is_required()} | given


def _did_you_mean(name: str, cls: type[Settings]) -> str:
    import difflib

    close = difflib.get_close_matches(name, cls.model_fields, n=1)
    return f"did you mean {close[0]!r}?" if close else "remove it."


def _take(argv: list[str], name: str) -> tuple[list[str], str | None]:
    """The arguments and the value of one flag (`--flag value` or `--flag=value`); --config is taken out."""
    for i, word in enumerate(argv):
        if word == name and i + 1 < len(argv):
            return (argv[:i] + argv[i + 2 :] if name == "--config" else argv), argv[i + 1]
        if word.startswith(name + "="):
            return (argv[:i] + argv[i + 1 :] if name == "--config" else argv), word.partition("=")[2]
    return argv, None


def _one_line(stop: SystemExit, box: str, prog: str) -> str:
    """tyro's message without its box, or pydantic's where a value was refused."""
    cause: BaseException | None = stop
    while cause := (cause.__cause__ or cause.__context__):
        if isinstance(cause, ValidationError):
            return describe(cause)
    text = " ".join(_BOX.sub(" ", box).split())
    return f"{_TAIL.sub('', text).strip()} ({prog} --help lists every flag)"
