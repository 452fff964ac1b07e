"""Settings of the commands that belong to no stage."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field

from calotype.config import DataSettings, Maybe, Preset, Settings

Source = Annotated[str, tyro.conf.arg(metavar="SOURCE")]
Model = Annotated[Path, tyro.conf.arg(metavar="MODEL")]
Run = Annotated[Path, tyro.conf.arg(metavar="RUN")]


class SheetSettings(DataSettings):
    """Read a source once: what is there, what is unreadable, what is held out; writes data.json."""

    source: tyro.conf.Positional[Source] = Field(description="shapes, shapes:full or a folder of pictures")
    out: Path = Field(description="folder that gets data.json and manifest.jsonl")
    seed: int = Field(0, ge=0, description="seed of a procedural source")
    preset: Preset = Field("tiny", description="gives --image-size where it is not given")
    fresh: bool = Field(False, description="read the source again even if its data sheet is there")


class RunSettings(DataSettings):
    """All of it: data sheet, stage 1, latents, stage 2, export, metrics, report; again to go on."""

    FREE: ClassVar[frozenset[str]] = frozenset({"out", "resume", "fresh", "checkpoint_every", "nproc"})

    source: tyro.conf.Positional[Source] = Field(description="shapes, shapes:full or a folder of pictures")
    out: Path = Field(description="folder of the run")
    preset: Preset = Field("tiny", description="the one dial for width, batch, learning rate and length")
    flip: bool = Field(False, description="learn mirror images too")
    vae: Maybe[Path] = Field(None, description="use this autoencoder (a diffusers folder) instead of training one")
    factor: Maybe[Literal[2, 4, 8, 16, 32]] = Field(None, description="picture side divided by latent side")
    regularizer: Maybe[Literal["none", "kl", "tc", "vq", "fsq"]] = Field(None, description="of the latents")
    perceptual: Maybe[Literal["none", "features", "lpips"]] = Field(None, description="perceptual loss of stage 1")
    adversarial: Maybe[float] = Field(None, ge=0, description="weight of stage 1's adversarial loss; 0.5 is usual")
    objective: Maybe[Literal["flow", "v", "epsilon"]] = Field(None, description="of the diffusion model")
    steps: Maybe[int] = Field(None, ge=0, description="optimiser steps of each stage (default: by preset)")
    max_minutes: Maybe[float] = Field(None, gt=0, description="time for all of it, shared out over the stages")
    batch_size: Maybe[int] = Field(None, ge=1, description="examples of one optimiser step (default: by preset)")
    lr: Maybe[float] = Field(None, gt=0, description="peak learning rate of both stages (default: by preset)")
    seed: int = Field(0, ge=0, description="with it and the settings everything random is fixed")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is good at it")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    nproc: int = Field(1, ge=1, description="processes of both stages")
    resume: bool = Field(False, description="insist that there is something to go on from")
    fresh: bool = Field(False, description="throw away what --out holds and begin again")


class ExportSettings(Settings):
    """Put the parts of a run into one folder that diffusers loads."""

    run: Path = Field(description="folder of the run")
    out: Maybe[Path] = Field(None, description="folder of the model (default: RUN/pipeline)")
    seed: int = Field(0, ge=0, description="of the sample sheet")


class EvaluateSettings(Settings):
    """Measure a run on pictures that no stage has seen; writes RUN/metrics.json."""

    run: tyro.conf.Positional[Run] = Field(description="folder of the run")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is good at it")


class ReportSettings(Settings):
    """Write one self-contained page about a run: RUN/report.html."""

    run: tyro.conf.Positional[Run] = Field(description="folder of the run")


class GenerateSettings(Settings):
    """Draw pictures; each PNG carries its settings."""

    model: tyro.conf.Positional[Model] = Field(description="model folder, or a run folder that holds one")
    label: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="LABEL", help_behavior_hint="")]] = Field(
        None, description="class name; without one all take turns"
    )
    out: Path = Field(description="folder of the pictures")
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = Field(16, ge=1, description="number of pictures")
    seed: int = Field(0, ge=0, lt=2**63, description="picture i is drawn with seed + i")
    steps: Maybe[int] = Field(None, ge=1, le=1000, description="steps of the sampler (default: the model's)")
    guidance: Maybe[float] = Field(None, ge=0, le=100, description="guidance scale (default: the model's)")
    batch_size: int = Field(64, ge=1, description="pictures drawn at once")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is good at it")


class DemoSettings(Settings):
    """Serve a page to play with a model; unless --host says otherwise, only this machine can reach it."""

    model: tyro.conf.Positional[Model] = Field(description="model folder, or a run folder that holds one")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: Maybe[int] = Field(None, ge=1, le=65535, description="port (default: the first free one from 7860)")
    open_browser: bool = Field(False, description="open the page in a browser")
