"""Settings of stage 2."""

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro
from pydantic import Field, model_validator

from calotype.changes import Allowed, Fixed, Free
from calotype.config import Count, Maybe, Settings, Steps, TrainSettings

Run = Annotated[Path, tyro.conf.arg(metavar="RUN")]
Condition = Annotated[str, Field(pattern=r"^(none|class|text|inpaint|edges|superres:(2|4|8|16))$")]


class DiffusionSettings(TrainSettings):
    """Stage 2: train a diffusion model of the cached latents."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # In a few minutes more comes of the times near noise, where structure is decided (benchmarks.objectives).
        "tiny": {"width": 64, "depth": 2, "layers": 1, "batch_size": 64, "lr": 2e-3, "time_mean": 0.6},
        "small": {"width": 96, "depth": 3, "layers": 2, "batch_size": 128, "lr": 5e-4},
        "base": {"width": 160, "depth": 3, "layers": 2, "attention": True, "batch_size": 256, "lr": 2e-4},
        "large": {"width": 256, "depth": 4, "layers": 2, "attention": True, "batch_size": 512, "lr": 1e-4},
    }
    LENGTHS: ClassVar[dict[str, int]] = {"tiny": 1800, "small": 40_000, "base": 200_000, "large": 500_000}

    latents: Free[Path] = Field(description="folder of the latent cache")
    vae: Free[Maybe[Path]] = Field(None, description="the cache's autoencoder (default: LATENTS/../stage1_vae/vae)")
    data: Free[Maybe[Path]] = Field(None, description="data sheet for image conditions (default: LATENTS/../data.json)")
    init: Fixed[Maybe[Path]] = Field(None, description="go on from the UNet of this run")
    width: Fixed[int] = Field(64, ge=8, le=8192, description="channels of the first level")
    depth: Fixed[int] = Field(2, ge=1, le=5, description="levels at most, each half as large as the one before")
    layers: Fixed[int] = Field(1, ge=1, le=16, description="residual blocks a level")
    attention: Fixed[bool] = Field(False, description="self-attention below the first level")
    gradient_checkpointing: Allowed[bool] = Field(False, description="compute activations twice and keep fewer of them")

    condition: Fixed[Maybe[Condition]] = Field(
        None,
        description="none, class, text, inpaint, superres:N or edges; pictures are given beside the class where there "
        "are classes (default: class where there are any, else none)",
    )
    text_encoder: Free[Maybe[Path]] = Field(
        None, description="folder of a CLIP text encoder to use as it is, not trained"
    )
    text_width: Fixed[int] = Field(
        128, ge=16, le=8192, multiple_of=16, description="width of the text encoder that is trained"
    )
    text_layers: Fixed[int] = Field(2, ge=1, le=64, description="its layers")
    label_dropout: Fixed[float] = Field(
        0.05, ge=0, le=1, description="share of labels or captions hidden, for guidance"
    )

    objective: Fixed[Literal["flow", "v", "epsilon", "x0"]] = Field(
        "flow", description="what the network learns to predict"
    )
    density: Fixed[Maybe[Literal["uniform", "logit-normal", "mode"]]] = Field(
        None, description="of the times (default: logit-normal for flow, uniform for the rest)"
    )
    time_mean: Fixed[float] = Field(
        0.0,
        ge=-10,
        le=10,
        description="of the normal number whose sigmoid is a logit-normal time; above 0 is nearer noise",
    )
    time_std: Fixed[float] = Field(1.0, gt=0, le=10, description="its deviation")
    weighting: Fixed[Literal["none", "min-snr", "edm", "uncertainty"]] = Field(
        "none", description="of the errors, by time"
    )
    zero_terminal_snr: Fixed[bool] = Field(False, description="noise without a trace of the picture at the end (v, x0)")

    ema_width: Fixed[float] = Field(
        0.05, gt=0, lt=0.28, description="relative width of the weight average (EDM2's sigma_rel)"
    )
    no_snapshots: Fixed[bool] = Field(
        False, description="do not keep what `calotype posthoc-ema` makes other averages of"
    )
    kid_samples: Allowed[Count] = Field(
        128, ge=0, description="samples of each validation whose distance is taken (0: none)"
    )
    guidance: Allowed[Maybe[float]] = Field(
        None, ge=0, le=100, description="default guidance scale of the model (default: by condition)"
    )
    sampler_steps: Allowed[int] = Field(
        15, ge=1, le=1000, description="evaluations that the exported model uses by default"
    )

    @model_validator(mode="after")
    def _what_does_not_go_together(self) -> Self:
        if self.zero_terminal_snr and self.objective not in ("v", "x0"):
            raise ValueError(
                f"--zero-terminal-snr: pure noise tells a network of {self.objective} nothing; give --objective v."
            )
        if self.text_encoder and self.condition != "text":
            raise ValueError(f"--text-encoder {self.text_encoder} needs --condition text; add that, or leave it out.")
        if os.path.isfile(self.out / "index.json"):
            raise ValueError(f"--out {self.out} holds latents; give the model a folder of its own.")
        own_encoder = self.condition == "text" and not self.text_encoder
        self.refuse_idle("text_width text_layers", own_encoder, "--condition text (or with --text-encoder)")
        self.refuse_idle("time_std", self.time_density == "logit-normal", "--density logit-normal")
        return self

    @model_validator(mode="after")
    def _guidance_has_something_to_guide_by(self) -> Self:
        if self.guidance not in (None, 1) and self.condition == "none":
            raise ValueError(f"--guidance {self.guidance}: a model of --condition none has none; leave it out.")
        if self.guidance not in (None, 1) and self.label_dropout == 0:
            raise ValueError(
                f"--guidance {self.guidance} needs a network that also saw no label; give --label-dropout above 0."
            )
        return self

    @property
    def time_density(self) -> str:
        """The density of the times, also where none was given."""
        return self.density or ("logit-normal" if self.objective == "flow" else "uniform")


class PosthocEmaSettings(Settings):
    """Another weight average of a finished run, out of the snapshots that it kept."""

    run: tyro.conf.Positional[Run] = Field(description="folder of the run, or of its stage 2")
    width: float = Field(gt=0, lt=0.28, description="relative width of the average (EDM2's sigma_rel)")
    until: Maybe[Steps] = Field(None, ge=1, description="after this step, for an earlier model (--guide of export)")
    out: Maybe[Path] = Field(None, description="folder of the weights (default: in place of the exported ones)")

    @model_validator(mode="after")
    def _an_earlier_model_lies_elsewhere(self) -> Self:
        if self.until is not None and self.out is None:
            raise ValueError(f"--until {self.until} makes an earlier model; give it an --out of its own.")
        return self
