"""Settings: pydantic models <-> command-line flags <-> config.json; presets."""

import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from calotype.changes import Allowed, Fixed, Free
from calotype.complaints import about_words, called, describe, example, hopeless_word, is_required, shown, unknown_key
from calotype.errors import UserError

Preset = Literal["tiny", "small", "base", "large"]
PRESET_IMAGE_SIZE = {"tiny": "32", "small": "64", "base": "128", "large": "256"}
PROCEDURAL = ("shapes", "shapes:full")  # sources that are drawn and not read
T = TypeVar("T")
# A setting that need not be given; its description says what happens then.
Maybe = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]
ImageSize = Annotated[str, Field(pattern=r"^[1-9]\d{0,4}(x[1-9]\d{0,4})?$")]
# Limits that no sane run reaches; what is beyond them is a slip of the keyboard.
Steps = Annotated[int, Field(le=10**9)]
Minutes = Annotated[float, Field(le=5_256_000)]  # ten years
Count = Annotated[int, Field(le=10**6)]
Width = Annotated[int, Field(le=8192)]
Rate = Annotated[float, Field(gt=0, le=100)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

_ONCE = {"fresh", "resume", "allow_data_change"}
_MARKERS = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
_BOX = re.compile(r"[╭╮╰╯│─]+")
_TAIL = re.compile(r"(Argument helptext:|For full helptext|Perhaps you meant:\s*$).*")


class Settings(BaseModel):
    """The settings of one command: frozen, typed, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    @field_validator("*")
    @classmethod
    def _no_file_has_such_a_name(cls, value: Any) -> Any:
        if isinstance(value, (str, Path)) and "\0" in str(value):
            raise ValueError("must not hold a character of code 0")
        return value

    @model_validator(mode="after")
    def _resume_or_fresh(self) -> Self:
        if getattr(self, "resume", False) and getattr(self, "fresh", False):
            raise ValueError("--resume and --fresh exclude each other; give one of them.")
        return self

    def refuse_idle(self, names: str, works: bool, way: str) -> None:
        """Raise ValueError where one of these settings was given, and does nothing because `way` was not."""
        for name in names.split():
            if not works and getattr(self, name) != type(self).model_fields[name].default:
                named = called(type(self), name)
                value = "" if getattr(self, name) is True else f" {shown(getattr(self, name))}"
                raise ValueError(f"{named}{value} does nothing without {way}; add that, or leave {named} out.")

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values, without what is said for one call only."""
        return self.model_dump(mode="json", exclude=_ONCE)


class DataSettings(Settings):
    """Where pictures come from and how they are prepared; what is not given is as the data sheet says."""

    image_size: Fixed[Maybe[ImageSize]] = Field(
        None, description="side in pixels, or HEIGHTxWIDTH (default: by preset)"
    )
    fit: Fixed[Maybe[Literal["crop", "pad", "stretch"]]] = Field(None, description="way to that size (default: crop)")
    channels: Fixed[Maybe[Literal[1, 3]]] = Field(None, description="grey or colour (default: as the pictures are)")
    val: Fixed[Maybe[str]] = Field(
        None, description="held out: a folder, or a fraction by hash of the path (default: 0.05)"
    )
    allow_bad: Free[bool] = Field(False, description="go on even if more than 1 in 100 files is unreadable")

    @model_validator(mode="after")
    def _val_is_a_folder_or_a_fraction(self) -> Self:
        fraction = fraction_of(self.val)
        if (fraction is not None and not 0 < fraction < 1) or self.val == "":
            raise ValueError(f"--val {self.val} must be a folder or a fraction between 0 and 1; try --val 0.05.")
        return self

    @model_validator(mode="after")
    def _folders_apart(self) -> Self:
        source, out = getattr(self, "source", None), getattr(self, "out", None)
        if source is None or source in PROCEDURAL or not os.path.isdir(source):
            return self
        if out is not None and not out.suffix and _is_inside(out, source):
            raise ValueError(f"--out {out} lies inside SOURCE {source}, among the pictures; give a folder outside.")
        if self.val and fraction_of(self.val) is None:
            if not os.path.isdir(self.val):
                raise ValueError(f"--val {self.val} is no folder and no fraction between 0 and 1; try --val 0.05.")
            if _is_inside(self.val, source):
                raise ValueError(
                    f"--val {self.val} lies inside SOURCE {source}, so it would be trained on; move it outside."
                )
            if _is_inside(source, self.val):
                raise ValueError(f"--val {self.val} holds SOURCE {source}, which is trained on; give another folder.")
        return self

    @model_validator(mode="after")
    def _words_have_no_mirror_image(self) -> Self:
        source = getattr(self, "source", None)
        if getattr(self, "flip", False) and source in PROCEDURAL:
            raise ValueError(f"--flip: the pictures of {source} have captions, wrong for a mirror image; leave it out.")
        return self


class TrainSettings(Settings):
    """What every training command shares."""

    LENGTHS: ClassVar[dict[str, int]] = {}

    out: Free[Path] = Field(description="folder of this stage")
    preset: Allowed[Preset] = Field("tiny", description="the one dial for width, batch, learning rate and length")
    steps: Allowed[Maybe[Steps]] = Field(
        None, ge=0, description="optimiser steps (default: by preset, unless --max-minutes)"
    )
    max_minutes: Allowed[Maybe[Minutes]] = Field(
        None, gt=0, description="stop after this time; the schedule follows the clock"
    )
    batch_size: Fixed[Count] = Field(64, ge=1, description="examples of one optimiser step, over all processes")
    micro_batches: Allowed[Count] = Field(1, ge=1, description="parts in which a process walks through its share")
    lr: Allowed[Rate] = Field(1e-3, description="peak learning rate")
    lr_schedule: Allowed[Literal["cosine", "constant"]] = Field("cosine", description="after the warm-up")
    warmup_steps: Allowed[Steps] = Field(50, ge=0, description="steps of linear warm-up")
    optimizer: Fixed[Literal["adamw", "muon", "sgd"]] = Field(
        "adamw", description="muon is for matrices, with AdamW for the rest; sgd is plain descent, for comparisons"
    )
    weight_decay: Allowed[float] = Field(0.0, ge=0, le=10, description="decoupled weight decay")
    clip: Allowed[float] = Field(1.0, gt=0, le=1e6, description="largest gradient norm")
    seed: Fixed[Seed] = Field(0, description="with it and the settings everything random is fixed")
    precision: Allowed[Literal["auto", "fp32", "bf16"]] = Field(
        "auto", description="auto: bf16 where the device is good at it"
    )
    compile: Allowed[bool] = Field(False, description="compile the networks: minutes at first, worth it on a GPU")
    checkpoint_every: Free[Steps] = Field(500, ge=1, description="steps between checkpoints")
    keep_checkpoints: Free[Count] = Field(2, ge=1, description="checkpoints that are kept")
    validations: Allowed[Count] = Field(8, ge=1, description="validations and sample sheets over the run")
    log_every: Free[Steps] = Field(10, ge=1, description="steps whose mean makes one line of metrics.jsonl")
    trackers: Free[tuple[str, ...]] = Field((), description="accelerate trackers, such as tensorboard")
    allow_data_change: Free[bool] = Field(False, description="go on although the pictures are not as they were")
    resume: Free[bool] = Field(False, description="insist that there is something to go on from")
    fresh: Free[bool] = Field(False, description="throw away what --out holds and begin again")

    @model_validator(mode="after")
    def _batch_in_equal_parts(self) -> Self:
        if self.batch_size % self.micro_batches:
            near = max(1, self.batch_size // self.micro_batches) * self.micro_batches
            raise ValueError(
                f"--batch-size {self.batch_size} must be a multiple of --micro-batches {self.micro_batches}; "
                f"try {near}."
            )
        return self

    @model_validator(mode="after")
    def _plain_descent_has_no_decay(self) -> Self:
        if self.optimizer == "sgd" and self.weight_decay:
            raise ValueError(f"--weight-decay {self.weight_decay}: --optimizer sgd has none; leave one of them out.")
        return self

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


def _is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is a folder or lies in it, whatever links there are; never raises."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(os.path.join(folder, ""))


def height_width(image_size: str) -> tuple[int, int]:
    """`"32"` -> (32, 32); `"32x48"` -> (32, 48)."""
    height, _, width = image_size.partition("x")
    return int(height), int(width or height)


def parse(cls: type[Settings], argv: list[str], prog: str) -> Settings:
    """Settings from flags, over those of `--config FILE`, over the preset; raises UserError in one line."""
    if complaint := hopeless_word(cls, argv, prog):
        raise UserError(complaint)
    argv, config_file = _take(argv, "--config")
    given = read_settings(cls, Path(config_file)) if config_file else {}
    _, preset = _take(argv, "--preset")
    if preset and preset != given.get("preset", preset):  # the flag wins over the file, with all that it stands for
        given = {name: value for name, value in given.items() if name not in cls.PRESETS.get(preset, {})}
    preset = preset or given.get("preset", "tiny")
    required = {name: tyro.MISSING for name in cls.model_fields if is_required(cls, name)}
    default = cls.model_construct(**required | cls.PRESETS.get(preset, {}) | given)
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            description = f"{cls.__doc__} --config FILE gives settings too; flags win over it."
            return tyro.cli(cls, args=argv, prog=prog, description=description, default=default, config=_MARKERS)
    except SystemExit as stop:
        if stop.code == 0:
            raise
        complaint = _refused_by_pydantic(stop, cls) or about_words(cls, argv, prog, given)
        raise UserError(complaint or _unboxed(messages.getvalue(), prog)) from None


def read_settings(cls: type[Settings], file: Path) -> dict[str, Any]:
    """Validated values of a settings file; raises UserError naming the file and the key."""
    given = _read_json(file)
    unknown = sorted(set(given) - set(cls.model_fields))
    if unknown:
        raise UserError(f"{file}: unknown key {unknown[0]!r}; {unknown_key(unknown[0], cls)}")
    complete = {name: example(cls, name) for name in cls.model_fields if is_required(cls, name)} | given
    try:
        checked = cls.model_validate_json(json.dumps(complete), strict=True)
    except ValidationError as error:
        raise UserError(f"{file}: {describe(error, cls)}") from None
    return {name: getattr(checked, name) for name in given if name not in _ONCE}


def _read_json(file: Path) -> dict[str, Any]:
    way_out = "give the config.json of a run"
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {file} cannot be read ({error.strerror}); {way_out}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {file} is not JSON ({error}); {way_out}.") from None
    if not isinstance(given, dict):
        raise UserError(f"--config {file} holds no settings; {way_out}.")
    return given


def _take(argv: list[str], name: str) -> tuple[list[str], str | None]:
    """The arguments and the value of one flag (`--flag value` or `--flag=value`); --config is taken out."""
    for i, word in enumerate(argv):
        if word == name and i + 1 < len(argv):
            return (argv[:i] + argv[i + 2 :] if name == "--config" else argv), argv[i + 1]
        if word.startswith(name + "="):
            return (argv[:i] + argv[i + 1 :] if name == "--config" else argv), word.partition("=")[2]
    return argv, None


def _refused_by_pydantic(stop: SystemExit, cls: type[Settings]) -> str | None:
    """The complaint about a value that had the right type."""
    cause: BaseException | None = stop
    while cause := (cause.__cause__ or cause.__context__):
        if isinstance(cause, ValidationError):
            return describe(cause, cls)
    return None


def _unboxed(box: str, prog: str) -> str:
    """tyro's message without its box."""
    text = " ".join(_BOX.sub(" ", box).split())
    return f"{_TAIL.sub('', text).strip()} ({prog} --help lists every flag)"
