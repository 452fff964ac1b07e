"""Settings of the commands that draw."""

from pathlib import Path
from typing import Annotated, Literal, Self

import tyro
from pydantic import Field, model_validator

from calotype.config import ImageSize, Maybe, Settings

Model = Annotated[Path, tyro.conf.arg(metavar="MODEL")]
Label = tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="LABEL", help_behavior_hint="")]]
Count = Annotated[int | None, tyro.conf.arg(aliases=["-n"], help_behavior_hint="")]


# What a flow has none of.
_OF_DIFFUSION = (
    "steps sampler guidance guidance_interval guidance_rescale fast precision compile size image mask reproducible"
)


class DrawingSettings(Settings):
    """How pictures are drawn."""

    model: tyro.conf.Positional[Model] = Field(description="model folder, or a run folder that holds one")
    out: Path = Field(description="folder of the pictures")
    seed: int = Field(0, ge=0, lt=2**63, description="picture i is drawn with seed + i")
    steps: Maybe[int] = Field(None, ge=1, le=1000, description="steps of the sampler (default: the model's)")
    sampler: Maybe[str] = Field(
        None, description="ddim, dpm++2m, unipc, heun or euler; flow-… insists on a flow (default: the model's)"
    )
    guidance: Maybe[float] = Field(None, ge=0, le=100, description="guidance scale (default: the model's)")
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="guidance only at times between these, 0 the picture and 1 pure noise"
    )
    guidance_rescale: float = Field(0.0, ge=0, le=1, description="share of the deviation that guidance adds taken back")
    fast: bool = Field(False, description="with the student and the tiny decoder of `calotype distill`")
    batch_size: int = Field(64, ge=1, le=4096, description="pictures drawn at once")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is good at it")
    compile: bool = Field(False, description="compile the network, for many batches of one size: a minute at first")

    @model_validator(mode="after")
    def _interval_has_an_inside(self) -> Self:
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"--guidance-interval {low:g} {high:g} must be two times in order, from 0 to 1; try 0.2 0.8."
            )
        return self

    @model_validator(mode="after")
    def _last_seed_is_a_seed(self) -> Self:
        if self.seed + (getattr(self, "n", None) or 1) >= 2**63:
            raise ValueError(f"--seed {self.seed} leaves no room for the seeds of all pictures; try a smaller one.")
        return self


class GenerateSettings(DrawingSettings):
    """Draw pictures; each PNG carries its settings."""

    label: Label = Field(None, description="class name, without one all take turns; for a model of text the prompt")
    n: Count = Field(None, ge=1, le=1_000_000, description="number of pictures (default: 16, or one for each --image)")
    prior: Literal["diffusion", "flow"] = Field(
        "diffusion", description="flow: decode what the flow of `calotype train-flow` draws, by one evaluation of it"
    )
    flow: Maybe[Path] = Field(None, description="run of that flow (default: flow/ in the run)")
    temperature: float = Field(
        1.0, ge=0, le=10, description="deviation of the noise that a flow begins with; below 1 is tamer"
    )
    size: Maybe[ImageSize] = Field(
        None, description="side in pixels, or HEIGHTxWIDTH, from the model's own on (default: the model's)"
    )
    image: Maybe[Path] = Field(
        None, description="what a model of given pictures begins with: one, or a folder of them (others: calotype edit)"
    )
    mask: Maybe[Path] = Field(None, description="what to repaint of it, white on black")
    reproducible: bool = Field(
        False,
        description="the same bit by bit whatever --batch-size and threads: one at a time on one thread, which takes "
        "1.6 to 4 times as long for 16 pictures, and more where threads or an accelerator would have helped",
    )

    @model_validator(mode="after")
    def _what_belongs_to_which_prior(self) -> Self:
        is_flow = self.prior == "flow"
        self.refuse_idle("flow temperature", is_flow, "--prior flow")
        self.refuse_idle(_OF_DIFFUSION, not is_flow, "--prior diffusion")
        return self


class RegenerateSettings(Settings):
    """Draw a picture again from what its PNG carries, and say whether it came out the same."""

    file: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FILE")]] = Field(
        description="PNG drawn by `calotype generate` or the demo"
    )
    model: Maybe[Path] = Field(None, description="model or run folder (default: one that FILE or this folder is in)")
    out: Maybe[Path] = Field(None, description="PNG of the new picture (default: FILE-again.png)")


class EditSettings(DrawingSettings):
    """Change pictures: draw them again from part of the way, repaint a part, or move their codes."""

    label: Label = Field(None, description="class name or prompt to be led by (default: none)")
    image: Path = Field(description="picture to change, or a folder of them")
    n: Count = Field(None, ge=1, description="pictures made of each (default: 1)")
    strength: Maybe[float] = Field(
        None,
        ge=0,
        le=1,
        description="how far back to noise: 0 leaves all, 1 nothing (default: 0.6, with --mask 1)",
    )
    mask: Maybe[Path] = Field(None, description="repaint what is white here and keep the rest")
    plus: Maybe[Path] = Field(None, description="move codes to the mean of the pictures in this folder …")
    minus: Maybe[Path] = Field(None, description="… from the mean of those in this one, and draw nothing")
    amount: float = Field(1.0, description="by how much of the difference")

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.plus is None) != (self.minus is None):
            raise ValueError(
                "--plus and --minus go together: a code moves from one folder's mean to the other's; give both or none."
            )
        if self.plus and (self.mask or self.strength is not None or self.label or self.n):
            raise ValueError("--plus and --minus move codes and draw nothing; leave LABEL, --mask, --strength, -n out.")
        return self


class InterpolateSettings(DrawingSettings):
    """Draw the way from one picture or seed to another, as pictures and an animation."""

    begin: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FROM")]] = Field(
        description="a seed, or a picture"
    )
    end: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="TO")]] = Field(description="a seed, or a picture")
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = Field(16, ge=2, description="pictures, with both ends")
    label: Maybe[str] = Field(None, description="class name or prompt of the first")
    to_label: Maybe[str] = Field(None, description="of the last (default: as --label)")
    milliseconds: int = Field(80, ge=10, description="that the animation shows each picture")

    @model_validator(mode="after")
    def _seeds_are_seeds(self) -> Self:
        for name, end in (("FROM", self.begin), ("TO", self.end)):
            if end.isdecimal() and int(end[:30]) >= 2**63:
                raise ValueError(
                    f"{name} {end} is no seed, which is less than 2**63; give a smaller one, or a picture."
                )
        return self


class PushSettings(Settings):
    """Send a model folder to the Hub; only here is anything ever sent, and the files are listed first."""

    model: tyro.conf.Positional[Model] = Field(description="model folder, or a run folder that holds one")
    repository: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="REPOSITORY")]] = Field(
        description="OWNER/NAME; an account is known from `hf auth login`"
    )
    private: bool = Field(False, description="only its owner can see it")
    licence: Maybe[str] = Field(None, description="for the model card, such as cc-by-4.0")
    dry_run: bool = Field(False, description="send nothing and write MODEL.push.json")
