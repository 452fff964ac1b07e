"""Settings of the commands that belong to no stage."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

import tyro
from pydantic import Field, model_validator

from calotype.changes import Allowed, Fixed, Free
from calotype.config import Count, DataSettings, Maybe, Minutes, Preset, Rate, Seed, Settings, Steps, Weight

Source = Annotated[str, tyro.conf.arg(metavar="SOURCE")]
Models = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="MODEL [MODEL ...]", help_behavior_hint="(required)")]
Run = Annotated[Path, tyro.conf.arg(metavar="RUN")]


class SheetSettings(DataSettings):
    """Read a source once: what is there, what is unreadable, what is held out; writes data.json.

    `calotype data check FOLDER` only looks; a folder that is called check is ./check.
    """

    source: tyro.conf.Positional[Source] = Field(description="shapes, shapes:full or a folder of pictures")
    out: Path = Field(description="folder that gets data.json and manifest.jsonl")
    seed: Seed = Field(0, description="seed of a procedural source")
    preset: Preset = Field("tiny", description="gives --image-size where it is not given")
    fresh: bool = Field(False, description="read the source again even if its data sheet is there")
    allow_data_change: bool = Field(False, description="read a source again that is not as its data sheet says")


class CheckSettings(Settings):
    """Look at every file of a folder: which a run could not read and why, links, classes, and a fingerprint."""

    source: tyro.conf.Positional[Source] = Field(description="folder of pictures")
    decode: bool = Field(False, description="decode every pixel, as a run does: finds damage in the middle of files")


class RunSettings(DataSettings):
    """All of it: data sheet, stage 1, latents, stage 2, export, metrics, report; again to go on."""

    source: Fixed[tyro.conf.Positional[Source]] = Field(description="shapes, shapes:full or a folder of pictures")
    out: Free[Path] = Field(description="folder of the run")
    preset: Fixed[Preset] = Field("tiny", description="the one dial for width, batch, learning rate and length")
    flip: Fixed[bool] = Field(False, description="learn mirror images too")
    vae: Fixed[Maybe[Path]] = Field(
        None, description="use this autoencoder (a diffusers folder) instead of training one"
    )
    factor: Fixed[Maybe[Literal[2, 4, 8, 16, 32]]] = Field(None, description="picture side divided by latent side")
    regularizer: Fixed[Maybe[Literal["none", "kl", "tc", "vq", "fsq"]]] = Field(None, description="of the latents")
    perceptual: Fixed[Maybe[Literal["none", "features", "lpips"]]] = Field(
        None, description="perceptual loss of stage 1"
    )
    adversarial: Fixed[Maybe[Weight]] = Field(None, description="weight of stage 1's adversarial loss; 0.5 is usual")
    condition: Fixed[Maybe[str]] = Field(
        None, description="none, class, text, inpaint, superres:N or edges (default: class)"
    )
    objective: Fixed[Maybe[Literal["flow", "v", "epsilon", "x0"]]] = Field(None, description="of the diffusion model")
    steps: Allowed[Maybe[Steps]] = Field(None, ge=0, description="optimiser steps of each stage (default: by preset)")
    max_minutes: Allowed[Maybe[Minutes]] = Field(
        None, gt=0, description="time for all of it, shared out over the stages"
    )
    batch_size: Fixed[Maybe[Count]] = Field(
        None, ge=1, description="examples of one optimiser step (default: by preset)"
    )
    lr: Allowed[Maybe[Rate]] = Field(None, description="peak learning rate of both stages (default: by preset)")
    seed: Fixed[Seed] = Field(0, description="with it and the settings everything random is fixed")
    precision: Allowed[Literal["auto", "fp32", "bf16"]] = Field(
        "auto", description="auto: bf16 where the device is good at it"
    )
    compile: Allowed[bool] = Field(False, description="compile the networks: minutes at first, worth it on a GPU")
    checkpoint_every: Free[Steps] = Field(500, ge=1, description="steps between checkpoints")
    nproc: Free[int] = Field(1, ge=1, le=1024, description="processes of both stages")
    allow_data_change: Free[bool] = Field(
        False, description="go on although the pictures are not as they were; they are read and encoded again"
    )
    resume: Free[bool] = Field(False, description="insist that there is something to go on from")
    fresh: Free[bool] = Field(False, description="throw away what --out holds and begin again")


class PlanSettings(DataSettings):
    """Measure this machine for a minute, and say what can be trained from these pictures in that time, and how."""

    source: tyro.conf.Positional[Source] = Field(description="shapes, shapes:full or a folder of pictures")
    hours: Annotated[float, Field(gt=0, le=87_600)] = Field(description="time for all of it, such as 2 or 0.5")
    preset: Maybe[Preset] = Field(None, description="keep to this one (default: the largest that is worth it)")
    factor: Maybe[Literal[2, 4, 8, 16, 32]] = Field(None, description="keep to this one (default: by size and time)")
    batch_size: Maybe[Count] = Field(None, ge=1, description="keep to this one (default: what fits into memory)")
    out: Maybe[Path] = Field(None, description="folder of the run in the command that is printed (default: runs/NAME)")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is good at it")


class ExportSettings(Settings):
    """Put the parts of a run into one folder that diffusers loads."""

    run: Path = Field(description="folder of the run")
    out: Maybe[Path] = Field(None, description="folder of the model (default: RUN/pipeline)")
    guide: Maybe[Path] = Field(None, description="weaker network to be guided away from: a run, or a UNet's folder")
    seed: Seed = Field(0, description="of the sample sheet")
    stock: bool = Field(False, description="instead a layout that diffusers loads with no flag: RUN/stock")
    verify: bool = Field(False, description="draw with it by diffusers alone in another process, and compare")
    onnx: bool = Field(False, description="also the networks as ONNX files, checked against torch")
    explorer: bool = Field(False, description="instead a page that explores the latents without a server: RUN/explorer")
    ort: Maybe[Path] = Field(None, description="npm package onnxruntime-web, unpacked, for --explorer")
    download: bool = Field(False, description="let npm fetch onnxruntime-web for --explorer")

    @model_validator(mode="after")
    def _what_does_not_go_together(self) -> Self:
        if self.stock and (self.onnx or self.explorer or self.guide):
            raise ValueError("--stock holds what diffusers knows alone; leave --onnx, --explorer and --guide out.")
        self.refuse_idle("ort download", self.explorer, "--explorer")
        if self.ort is not None and self.download:
            raise ValueError("--ort and --download exclude each other; give one of them.")
        if self.explorer and self.verify:
            raise ValueError("--verify compares drawings, which --explorer makes none of; leave one of them out.")
        if self.explorer and self.ort is None and not self.download:
            raise ValueError(
                "--explorer needs onnxruntime-web; give --ort DIR with its npm package unpacked, or --download."
            )
        return self


class EvaluateSettings(Settings):
    """Measure a run on pictures that no stage has seen, and what it draws against them; writes RUN/metrics.json."""

    run: tyro.conf.Positional[Run] = Field(description="folder of the run")
    n: Annotated[Maybe[int], tyro.conf.arg(aliases=["-n"])] = Field(
        None, ge=0, description="samples to measure, 0 for none (default: 512, or 2,000 on an accelerator)"
    )
    samples: Maybe[Path] = Field(None, description="measure this folder's pictures instead; sub-folders name classes")
    features: str = Field(
        "own", description="own, encoder, gradients, inception, dinov2, a file x.onnx, or a folder with safetensors"
    )
    reference: Literal["val", "train"] = Field("val", description="the split that samples are compared with")
    audit: bool = Field(False, description="search the training pictures for copies; writes RUN/evaluation")
    seed: int = Field(1000, ge=0, lt=2**63, description="sample i is drawn with seed + i")
    steps: Maybe[int] = Field(None, ge=1, le=1000, description="steps of the sampler (default: the model's)")
    guidance: Maybe[float] = Field(None, ge=0, le=100, description="guidance scale (default: the model's)")
    sampler: Maybe[str] = Field(None, description="ddim, dpm++2m, unipc, heun or euler (default: the model's)")
    batch_size: Count = Field(64, ge=1, description="samples drawn at once")
    allow_download: bool = Field(False, description="fetch the weights of inception or dinov2 if they are not here")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is good at it")

    @model_validator(mode="after")
    def _either_drawn_or_there(self) -> Self:
        for name in ("steps", "guidance", "sampler"):
            if self.samples is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"--{name} {getattr(self, name)} is about drawing, and --samples {self.samples} is drawn already; "
                    "leave one of them out."
                )
        return self


class ReportSettings(Settings):
    """Write one self-contained page about a run: RUN/report.html."""

    run: tyro.conf.Positional[Run] = Field(description="folder of the run")


class DemoSettings(Settings):
    """Serve a page to play with models; only this machine can reach it, unless it is --public."""

    models: tyro.conf.Positional[Models] = Field(
        min_length=1, description="model folders, or run folders that hold one; visitors choose by name"
    )
    host: Maybe[str] = Field(None, description="address to listen on (default: 127.0.0.1, or 0.0.0.0 with --public)")
    port: Maybe[int] = Field(None, ge=1, le=65535, description="port (default: the first free one from 7860)")
    public: bool = Field(False, description="let others reach the page; asks them for a password, printed at the start")
    password_file: Maybe[Path] = Field(None, description="ask for the password in this file's first line")
    no_auth: bool = Field(False, description="with --public: ask for no password")
    open_browser: bool = Field(False, description="open the page in a browser")

    @property
    def address(self) -> str:
        """The address to listen on."""
        return self.host or ("0.0.0.0" if self.public else "127.0.0.1")

    @model_validator(mode="after")
    def _others_come_in_only_when_asked(self) -> Self:
        if not self.public and not _is_loopback(self.address):
            raise ValueError(
                f"--host {self.host}: others could reach it; add --public, which asks them for a password, "
                "or leave --host out."
            )
        if self.no_auth and not self.public:
            raise ValueError("--no-auth says nothing without --public; leave it out, or add --public.")
        if self.no_auth and self.password_file is not None:
            raise ValueError("--no-auth and --password-file exclude each other; give one of them.")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class DoctorSettings(Settings):
    """Try out whether this machine can be trusted with a run, and print a table; nothing is left behind."""

    out: Maybe[Path] = Field(None, description="folder whose disk is tried (default: the current one)")
    quick: bool = Field(False, description="leave out what trains: seconds instead of a minute")
