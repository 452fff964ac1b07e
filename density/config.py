"""Settings of the densities."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro
from pydantic import Field, model_validator

from calotype.changes import Allowed, Fixed, Free
from calotype.config import Count, Maybe, Seed, Settings, TrainSettings
from calotype.settings import Run

_OtherSource = Annotated[str | None, tyro.conf.arg(metavar="[SOURCE]", help_behavior_hint="")]


class FlowSettings(TrainSettings):
    """Train a normalizing flow: the exact density of latents, or of small pictures, that is also a generator."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"width": 128, "batch_size": 128, "lr": 1e-3},
        "small": {"width": 256, "batch_size": 256, "lr": 1e-3},
        "base": {"width": 512, "batch_size": 256, "lr": 5e-4},
        "large": {"width": 512, "batch_size": 512, "lr": 3e-4},
    }
    LENGTHS: ClassVar[dict[str, int]] = {"tiny": 2000, "small": 20_000, "base": 100_000, "large": 300_000}

    latents: Free[Maybe[Path]] = Field(None, description="folder of the latent cache")
    pixels: Free[Maybe[Path]] = Field(None, description="instead the pictures of this data.json themselves")
    vae: Free[Maybe[Path]] = Field(None, description="the cache's autoencoder (default: LATENTS/../stage1_vae/vae)")
    kind: Fixed[Literal["realnvp", "glow", "nsf", "ffjord"]] = Field(
        "glow", description="glow convolves, for latents with sides, best even ones; the others see a flat vector"
    )
    condition: Fixed[Maybe[Literal["none", "class"]]] = Field(
        None, description="what it is told (default: class where there are any)"
    )
    width: Fixed[int] = Field(128, ge=4, le=8192, description="hidden units or channels of its networks")
    depth: Fixed[Maybe[int]] = Field(
        None, ge=1, le=128, description="layers, of glow steps a level (default: 8; nsf 6, ffjord 1)"
    )
    noise: Fixed[Maybe[float]] = Field(
        None, ge=0, le=10, description="added to latents, whose density it then is (default: 0; 0.05 without posterior)"
    )
    ema_width: Fixed[float] = Field(0.05, gt=0, lt=0.28, description="relative width of the weight average")
    precision: Allowed[Literal["fp32"]] = Field("fp32", description="always: an inverse in half of it is none")
    compile: Allowed[Literal[False]] = Field(False, description="not for flows")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.latents is None) == (self.pixels is None):
            raise ValueError("--latents and --pixels: a flow is of latents or of pictures; give one of them.")
        self.refuse_idle("vae noise", self.latents is not None, "--latents")
        return self


class LikelihoodSettings(Settings):
    """How likely held-out pictures are under each model of a run, in bits per dimension; writes RUN/likelihood.json."""

    run: tyro.conf.Positional[Run] = Field(description="folder of the run")
    source: tyro.conf.Positional[_OtherSource] = Field(
        None, description="other pictures, prepared as those of the run (default: its held-out ones)"
    )
    out: Maybe[Path] = Field(None, description="file of the figures (default: likelihood.json in RUN)")
    n: Annotated[Count, tyro.conf.arg(aliases=["-n"])] = Field(500, ge=2, description="pictures at most, spread evenly")
    samples: Count = Field(64, ge=2, description="of z for each picture, for the bounds on log p(x)")
    labels: bool = Field(False, description="log p(z | label): tell the flow and the diffusion model what is there")
    solver: Literal["rk4", "heun", "dopri5"] = Field("rk4", description="of the diffusion model's ODE")
    ode_steps: Maybe[int] = Field(None, ge=1, le=10_000, description="of it (default: 8, or 20 of heun)")
    tolerance: float = Field(1e-3, gt=0, le=1, description="of --solver dopri5, relative and absolute")
    probes: int = Field(1, ge=1, le=10_000, description="of Hutchinson's estimate of the trace; more are less noise")
    exact_trace: bool = Field(False, description="no estimate: as many times the work as latents have numbers")
    batch_size: Count = Field(64, ge=1, description="pictures at once")
    seed: Seed = Field(0, description="of the samples and the probes")
    precision: Literal["auto", "fp32", "bf16"] = Field("fp32", description="of the autoencoder; densities are in fp32")

    @model_validator(mode="after")
    def _nothing_for_nothing(self) -> Self:
        self.refuse_idle("tolerance", self.solver == "dopri5", "--solver dopri5")
        self.refuse_idle("ode_steps", self.solver != "dopri5", "--solver rk4 or heun")
        if self.exact_trace and self.probes != 1:
            raise ValueError(f"--probes {self.probes}: --exact-trace needs none; leave one of them out.")
        return self
