"""Settings of stage 2."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from calotype.config import Maybe, TrainSettings


class DiffusionSettings(TrainSettings):
    """Stage 2: train a diffusion model of the cached latents."""

    FREE: ClassVar[frozenset[str]] = TrainSettings.FREE | {"latents", "vae", "init"}
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"width": 64, "depth": 2, "layers": 1, "batch_size": 64, "lr": 1e-3},
        "small": {"width": 96, "depth": 3, "layers": 2, "batch_size": 128, "lr": 5e-4},
        "base": {"width": 160, "depth": 3, "layers": 2, "attention": True, "batch_size": 256, "lr": 2e-4},
        "large": {"width": 256, "depth": 4, "layers": 2, "attention": True, "batch_size": 512, "lr": 1e-4},
    }

    LENGTHS: ClassVar[dict[str, int]] = {"tiny": 1800, "small": 40_000, "base": 200_000, "large": 500_000}

    latents: Path = Field(description="folder of the latent cache")
    vae: Maybe[Path] = Field(None, description="the cache's autoencoder (default: LATENTS/../stage1_vae/vae)")
    init: Maybe[Path] = Field(None, description="go on from the UNet of this run")
    width: int = Field(64, ge=8, description="channels of the first level")
    depth: int = Field(2, ge=1, le=5, description="levels at most, each half as large as the one before")
    layers: int = Field(1, ge=1, description="residual blocks a level")
    attention: bool = Field(False, description="self-attention below the first level")
    objective: Literal["flow", "v", "epsilon"] = Field("flow", description="what the network learns to predict")
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of labels hidden, for guidance")
    unconditional: bool = Field(False, description="ignore the labels of the source")
    ema_width: float = Field(0.05, gt=0, lt=0.28, description="relative width of the weight average (EDM2's sigma_rel)")
    guidance: float = Field(1.5, ge=0, description="guidance scale that the exported model uses by default")
    sampler_steps: int = Field(18, ge=1, description="evaluations that the exported model uses by default")
