"""Settings of `calotype anomaly`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import tyro
from pydantic import Field, model_validator

from calotype.config import Count, DataSettings, Maybe, Preset, Seed, Settings, Steps
from calotype.settings import Source

Model = Annotated[Path, tyro.conf.arg(metavar="MODEL")]
Pictures = Annotated[Path, tyro.conf.arg(metavar="DIR")]


class AnomalyFitSettings(DataSettings):
    """Learn what normal pictures look like, so that others stand out; the same command again goes on.

    What the run folder lacks is made by the commands that are printed; what is there is used as it is.
    """

    VAE_LENGTHS: ClassVar[dict[str, int]] = {"tiny": 600, "small": 10_000, "base": 50_000, "large": 150_000}
    FLOW_LENGTHS: ClassVar[dict[str, int]] = {"tiny": 1000, "small": 10_000, "base": 50_000, "large": 150_000}

    source: tyro.conf.Positional[Source] = Field(description="shapes, a folder of normal pictures, or a data.json")
    out: Path = Field(description="folder of the run")
    preset: Preset = Field("tiny", description="the one dial for width, batch, learning rate and length")
    latent_dim: Maybe[int] = Field(
        None, ge=1, le=65_536, description="numbers of a picture's code (default: 32; a grid of codes if it is oblong)"
    )
    steps: Maybe[Steps] = Field(None, ge=1, description="optimiser steps of the autoencoder (default: by preset)")
    flow: Maybe[Literal["realnvp", "glow", "nsf", "ffjord"]] = Field(
        None, description="exact density of codes (default: realnvp; glow where they have height and width)"
    )
    flow_steps: Maybe[Steps] = Field(None, ge=1, description="optimiser steps of the flow (default: by preset)")
    diffusion: bool = Field(False, description="also a diffusion model of the codes, and its likelihood as a score")
    diffusion_steps: Maybe[Steps] = Field(
        None, ge=1, description="optimiser steps of the diffusion model (default: by preset)"
    )
    batch_size: Count = Field(256, ge=1, description="pictures scored at once")
    seed: Seed = Field(0, description="with it and the settings everything random is fixed")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of the training; scores are made in fp32")
    fresh: bool = Field(False, description="calibrate again even if RUN/anomaly is there")

    @model_validator(mode="after")
    def _nothing_for_nothing(self) -> Self:
        self.refuse_idle("diffusion_steps", self.diffusion, "--diffusion")
        return self

    @property
    def vae_length(self) -> int:
        """Optimiser steps of the autoencoder."""
        return self.steps or self.VAE_LENGTHS[self.preset]

    @property
    def flow_length(self) -> int:
        """Optimiser steps of the flow."""
        return self.flow_steps or self.FLOW_LENGTHS[self.preset]


class AnomalyScoreSettings(Settings):
    """Say of every picture of a folder how strange it is; writes OUT/scores.csv and OUT/index.html."""

    model: tyro.conf.Positional[Model] = Field(description="run folder of `calotype anomaly fit`, or its anomaly/")
    dir: tyro.conf.Positional[Pictures] = Field(description="folder of pictures; sub-folders name classes")
    out: Path = Field(description="folder that gets scores.csv and index.html")
    false_alarms: float = Field(0.05, gt=0, lt=1, description="share of normal pictures that may raise an alarm")
    normal: tuple[str, ...] = Field((), description="classes that are normal (default: normal, good, or as trained)")
    show: int = Field(200, ge=0, le=2000, description="of the strangest pictures on the page; the CSV has all")
    batch_size: Count = Field(64, ge=1, description="pictures scored at once")
    precision: Literal["auto", "fp32", "bf16"] = Field("fp32", description="of the networks")

    @model_validator(mode="after")
    def _folders_apart(self) -> Self:
        if self.out.resolve().is_relative_to(self.dir.resolve()):
            raise ValueError(f"--out {self.out} lies inside DIR {self.dir}, among the pictures; give a folder outside.")
        return self
