"""Settings of stage 1 and of the latent cache."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro
from pydantic import BeforeValidator, Field, model_validator

from calotype.changes import Allowed, Fixed, Free
from calotype.config import (
    Count,
    DataSettings,
    Maybe,
    Rate,
    Seed,
    Settings,
    Steps,
    TrainSettings,
    Weight,
    fraction_of,
    height_width,
)
from calotype.settings import Source

_MOST_CODES = 2**18
_CORRUPTIONS = {"gaussian": 10, "mask": 1, "salt": 1}  # the most of each


def refuse_uneven(image_size: str, factor: int) -> None:
    """Raise ValueError where a side of the pictures is no multiple of the factor."""
    sides = height_width(image_size)
    if any(side % factor for side in sides):
        near = [str(max(factor, side // factor * factor)) for side in sides]
        near = "x".join(near if "x" in image_size else near[:1])
        raise ValueError(
            f"--image-size {image_size} must be a multiple of {factor}, the autoencoder's --factor; try {near}."
        )


class VaeSettings(TrainSettings, DataSettings):
    """Stage 1: train an autoencoder that squeezes pictures into small latents."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"width": 16, "factor": 4, "layers": 1, "batch_size": 32, "lr": 4e-3},
        "small": {"width": 32, "factor": 4, "layers": 1, "batch_size": 64, "lr": 2e-3},
        "base": {"width": 64, "factor": 8, "layers": 2, "batch_size": 64, "lr": 5e-4},
        "large": {"width": 128, "factor": 8, "layers": 2, "batch_size": 64, "lr": 1e-4},
    }

    LENGTHS: ClassVar[dict[str, int]] = {"tiny": 1200, "small": 20_000, "base": 100_000, "large": 300_000}

    source: Free[tyro.conf.Positional[Source]] = Field(description="shapes, a folder of pictures, or a data.json")
    init: Fixed[Maybe[Path]] = Field(None, description="start from this autoencoder (a diffusers folder)")
    width: Fixed[int] = Field(16, ge=4, le=4096, description="channels of the first level")
    factor: Fixed[Literal[2, 4, 8, 16, 32]] = Field(4, description="picture side divided by latent side")
    layers: Fixed[int] = Field(1, ge=1, le=16, description="residual blocks a level")
    latent_channels: Fixed[int] = Field(4, ge=1, le=1024, description="channels of the latent")
    attention: Fixed[bool] = Field(False, description="self-attention in the middle block")
    latent_dim: Fixed[Maybe[int]] = Field(
        None, ge=1, le=65_536, description="squeeze a picture into this many numbers (a 1x1 latent)"
    )
    regularizer: Fixed[Literal["none", "kl", "tc", "vq", "fsq"]] = Field("kl", description="of the latents")
    beta: Fixed[Maybe[Weight]] = Field(None, description="weight of KL in a bound on log p(x); 1 makes it the ELBO")
    likelihood: Fixed[Maybe[Literal["gaussian", "laplace", "bernoulli"]]] = Field(
        None, description="p(x|z) of such a bound (default: gaussian, where --beta or tc ask for a bound)"
    )
    likelihood_scale: Fixed[Maybe[float]] = Field(
        None, ge=1e-4, le=100, description="its scale, pixels in [-1, 1] (default: learnt)"
    )
    gamma: Fixed[Weight] = Field(10.0, description="weight of the total correlation (--regularizer tc)")
    posterior_std: Fixed[Maybe[float]] = Field(
        None,
        ge=1e-6,
        le=100,
        description="fixed standard deviation of the posterior (default: learnt in a bound, else 0.1)",
    )
    learn_variance: Fixed[bool] = Field(False, description="let the encoder give the posterior's variance in any case")
    beta_warmup: Fixed[Steps] = Field(0, ge=0, description="steps over which beta grows from 0")
    free_bits: Fixed[Weight] = Field(0.0, description="nats that each element of the latent may hold for nothing")
    free_bits_per_sample: Fixed[bool] = Field(
        False, description="an allowance for each picture instead of the batch's mean"
    )
    codebook: Fixed[int] = Field(512, ge=2, le=2**18, description="vectors in the VQ codebook")
    commitment: Fixed[Weight] = Field(0.25, description="weight of the VQ commitment term")
    levels: Fixed[str] = Field(
        "8,5,5,5", pattern=r"^\d{1,6}(,\d{1,6}){0,17}$", description="values of each FSQ channel"
    )
    corruption: Fixed[Maybe[str]] = Field(None, description="damage the input: gaussian:STD, mask:SHARE or salt:SHARE")
    reconstruction: Fixed[Maybe[Literal["l1", "mse"]]] = Field(
        None, description="error without a bound (default: mse; l1 beside a perceptual loss)"
    )
    perceptual: Fixed[Literal["none", "features", "lpips"]] = Field("none", description="perceptual loss")
    perceptual_weight: Fixed[Maybe[Weight]] = Field(
        None, gt=0, description="its weight (default: 3 for features, 1 for lpips)"
    )
    allow_download: Free[bool] = Field(
        False, description="fetch the weights of --perceptual lpips if they are not here"
    )
    adversarial: Fixed[Weight] = Field(0.0, description="weight of the adversarial loss; 0 for none, 0.5 is usual")
    adversarial_start: Allowed[str] = Field("0.5", description="share of the run after which it begins, or plateau")
    adversarial_pretraining: Allowed[Steps] = Field(
        200, ge=0, description="steps of the discriminator before the decoder sees it"
    )
    adversarial_cap: Allowed[Weight] = Field(100.0, gt=0, description="largest adaptive weight")
    r1: Fixed[Weight] = Field(0.1, description="weight of the discriminator's gradient penalty on real pictures")
    max_psnr_drop: Allowed[float] = Field(
        1.5, gt=0, le=1000, description="dB that sharpness may cost before the run goes back"
    )
    discriminator_lr: Allowed[Maybe[Rate]] = Field(None, description="of the critic (default: a tenth of --lr)")
    flip: Fixed[bool] = Field(False, description="mirror half of the pictures")
    workers: Free[int] = Field(0, ge=0, le=256, description="processes that decode pictures; 0 decodes in the main one")

    @model_validator(mode="after")
    def _one_error(self) -> Self:
        if self.bound and self.reconstruction:
            likelihood = {"l1": "laplace", "mse": "gaussian"}[self.reconstruction]
            raise ValueError(
                f"--reconstruction {self.reconstruction} is no part of a bound, which --beta, --likelihood or tc ask "
                f"for; give --likelihood {likelihood} in its place."
            )
        return self

    @model_validator(mode="after")
    def _start_is_a_share_or_a_plateau(self) -> Self:
        share = fraction_of(self.adversarial_start)
        if self.adversarial_start != "plateau" and (share is None or not 0 <= share < 1):
            raise ValueError(
                f"--adversarial-start {self.adversarial_start} must be a share from 0 to 1, or plateau; try 0.5."
            )
        return self

    @model_validator(mode="after")
    def _levels_are_few_enough(self) -> Self:
        levels = self.fsq_levels
        if min(levels) < 2 or math.prod(levels) > _MOST_CODES:
            raise ValueError(
                f"--levels {self.levels} must be 2 or more each, with at most {_MOST_CODES:,} combinations; "
                "try 8,5,5,5."
            )
        if self.regularizer == "fsq" and self.latent_dim not in (None, len(levels)):
            raise ValueError(
                f"--latent-dim {self.latent_dim} and --levels {self.levels} differ in number; give as many levels as "
                "numbers."
            )
        return self

    @model_validator(mode="after")
    def _corruption_is_known(self) -> Self:
        if self.corruption is None:
            return self
        kind, _, amount = self.corruption.partition(":")
        share = fraction_of(amount)
        if share is None or not 0 < share <= _CORRUPTIONS.get(kind, 0):
            raise ValueError(
                f"--corruption {self.corruption} must be gaussian:STD, mask:SHARE or salt:SHARE; try gaussian:0.3."
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_given_for_nothing(self) -> Self:
        kind = self.regularizer
        posterior = kind in ("kl", "tc")
        self.refuse_idle("gamma", kind == "tc", "--regularizer tc")
        self.refuse_idle("levels", kind == "fsq", "--regularizer fsq")
        self.refuse_idle("codebook", kind == "vq" and not self.init, "--regularizer vq (and without --init)")
        self.refuse_idle("commitment", kind == "vq" or self.init is not None, "--regularizer vq")
        self.refuse_idle("beta beta_warmup free_bits posterior_std learn_variance", posterior, "--regularizer kl or tc")
        self.refuse_idle("free_bits_per_sample", self.free_bits > 0, "--free-bits")
        self.refuse_idle("likelihood_scale", self.bound, "--likelihood or --beta")
        self.refuse_idle("perceptual_weight", self.perceptual != "none", "--perceptual")
        self.refuse_idle("latent_dim", self.init is None, "a new autoencoder (--init brings its own)")
        return self

    @model_validator(mode="after")
    def _black_and_white_has_no_scale(self) -> Self:
        if self.likelihood == "bernoulli" and self.likelihood_scale is not None:
            raise ValueError(
                f"--likelihood-scale {self.likelihood_scale}: --likelihood bernoulli has none; leave one of them out."
            )
        return self

    @model_validator(mode="after")
    def _sides_shrink_evenly(self) -> Self:
        if self.image_size and self.init is None and self.latent_dim is None:
            refuse_uneven(self.image_size, self.factor)
        return self

    @property
    def fsq_levels(self) -> tuple[int, ...]:
        """`8,5,5,5` as numbers."""
        return tuple(map(int, self.levels.split(",")))

    @property
    def bound(self) -> bool:
        """Whether the loss is a bound on log p(x) in nats rather than an error with a weak pull on the latents."""
        return self.likelihood is not None or self.beta is not None or self.regularizer == "tc"

    @property
    def likelihood_kind(self) -> str:
        """Name of p(x|z)."""
        return self.likelihood or "gaussian"

    @property
    def fixed_posterior_std(self) -> float | None:
        """The standard deviation that every posterior has; None where the encoder gives it."""
        if self.learn_variance or (self.bound and self.posterior_std is None):
            return None
        return self.posterior_std or 0.1


class EncodeSettings(DataSettings):
    """Encode every picture once; stage 2 reads the cache."""

    source: tyro.conf.Positional[Source] = Field(description="shapes, a folder of pictures, or a data.json")
    vae: Path = Field(description="autoencoder (a diffusers folder)")
    out: Path = Field(description="folder of the cache")
    flip: bool = Field(False, description="cache mirror images too")
    batch_size: Maybe[Count] = Field(
        None, ge=1, description="pictures encoded at once (default: 128; on a CPU as many as its caches hold)"
    )
    shard_size: int = Field(16_384, ge=1, le=10**7, description="pictures in one shard")
    seed: Seed = Field(0, description="seed of a procedural source")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is good at it")
    allow_data_change: bool = Field(False, description="encode although the pictures are not as the data sheet says")
    fresh: bool = Field(False, description="encode again even if the cache is complete")

    @model_validator(mode="after")
    def _folders_of_their_own(self) -> Self:
        if os.path.isfile(self.out / "config.json"):
            raise ValueError(f"--out {self.out} holds a model or a run; give the latents a folder of their own.")
        return self


class EmbedSettings(DataSettings):
    """Write the code of every picture into one file; where there are labels, see how well codes tell them apart."""

    source: tyro.conf.Positional[Source] = Field(description="shapes, a folder of pictures, or a data.json")
    vae: Path = Field(description="autoencoder (a diffusers folder)")
    out: Path = Field(description="file that gets the codes: .npz or .parquet")
    batch_size: Count = Field(128, ge=1, description="pictures encoded at once")
    seed: Seed = Field(0, description="seed of a procedural source, and of the untrained encoder")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is good at it")
    fresh: bool = Field(False, description="replace --out if it is there")


class TokensSettings(EmbedSettings):
    """Write every picture as a grid of code numbers into one file; needs an autoencoder with a codebook."""

    out: Path = Field(description="file that gets the tokens: .npz")
    seed: Seed = Field(0, description="seed of a procedural source")


class ConvertSettings(Settings):
    """Turn a latent-diffusion checkpoint of an autoencoder into a folder for --init and --vae."""

    file: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FILE")]] = Field(
        description="checkpoint from elsewhere (.ckpt, .pt, .pth, .bin or .safetensors), its autoencoder alone or not"
    )
    out: Path = Field(description="folder of the autoencoder")
    image_size: int = Field(
        256, ge=1, le=99_999, description="side of the pictures it is meant for; kept in its config"
    )


def _one_or_more(value: Any) -> Any:
    """A settings file may name a single folder without brackets."""
    return (value,) if isinstance(value, str) else value


class EvaluateVaeSettings(DataSettings):
    """Measure an autoencoder, or several seeds of one, on held-out pictures: mean and deviation over the seeds."""

    source: tyro.conf.Positional[Source] = Field(description="shapes, a folder of pictures, or a data.json")
    vae: Annotated[tuple[Path, ...], BeforeValidator(_one_or_more)] = Field(
        min_length=1, description="one autoencoder or more (diffusers folders), seeds of one model"
    )
    out: Maybe[Path] = Field(None, description="file of the figures (default: evaluation.json beside the first --vae)")
    features: Literal["gradients", "inception"] = Field(
        "gradients", description="in which rfid and rkid compare pictures with reconstructions"
    )
    allow_download: bool = Field(False, description="fetch the weights of --features inception if they are not here")
    samples: Count = Field(64, ge=1, description="of z for each picture, for the bounds on log p(x)")
    batch_size: Count = Field(128, ge=1, description="pictures at once")
    seed: Seed = Field(0, description="of a procedural source, and of the samples")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is good at it")
