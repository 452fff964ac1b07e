"""Settings of stage 1 and of the latent cache."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro
from pydantic import Field

from calotype.config import DataSettings, Maybe, TrainSettings
from calotype.settings import Source


class VaeSettings(TrainSettings, DataSettings):
    """Stage 1: train an autoencoder that squeezes pictures into small latents."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"width": 16, "factor": 4, "layers": 1, "batch_size": 32, "lr": 4e-3},
        "small": {"width": 32, "factor": 4, "layers": 1, "batch_size": 64, "lr": 2e-3},
        "base": {"width": 64, "factor": 8, "layers": 2, "batch_size": 64, "lr": 5e-4},
        "large": {"width": 128, "factor": 8, "layers": 2, "batch_size": 64, "lr": 1e-4},
    }

    LENGTHS: ClassVar[dict[str, int]] = {"tiny": 1200, "small": 20_000, "base": 100_000, "large": 300_000}

    source: tyro.conf.Positional[Source] = Field(description="shapes, a folder of pictures, or a data.json")
    init: Maybe[Path] = Field(None, description="start from this autoencoder (a diffusers folder)")
    width: int = Field(16, ge=4, description="channels of the first level")
    factor: Literal[2, 4, 8, 16, 32] = Field(4, description="picture side divided by latent side")
    layers: int = Field(1, ge=1, description="residual blocks a level")
    latent_channels: int = Field(4, ge=1, description="channels of the latent")
    attention: bool = Field(False, description="self-attention in the middle block")
    latent_dim: Maybe[int] = Field(None, ge=1, description="squeeze a picture into this many numbers (a 1x1 latent)")
    regularizer: Literal["none", "kl", "vq", "fsq"] = Field("kl", description="of the latents")
    posterior_std: float = Field(0.1, gt=0, description="fixed standard deviation of the KL posterior")
    learn_variance: bool = Field(False, description="let the encoder give the posterior's variance instead")
    beta: float = Field(1e-3, ge=0, description="weight of the regulariser, per pixel value")
    beta_warmup: int = Field(0, ge=0, description="steps over which beta grows from 0")
    free_bits: float = Field(0.0, ge=0, description="nats that each element of the latent may hold for nothing")
    free_bits_per_sample: bool = Field(False, description="an allowance for each picture instead of the batch's mean")
    codebook: int = Field(512, ge=2, description="vectors in the VQ codebook")
    commitment: float = Field(0.25, ge=0, description="weight of the VQ commitment term")
    levels: str = Field("8,5,5,5", pattern=r"^\d+(,\d+)*$", description="values of each FSQ channel")
    corruption: Maybe[str] = Field(None, description="damage the input: gaussian:STD, mask:SHARE or salt:SHARE")
    reconstruction: Literal["l1", "mse"] = Field("mse", description="reconstruction loss")
    flip: bool = Field(False, description="mirror half of the pictures")
    workers: int = Field(0, ge=0, description="processes that decode pictures; 0 decodes in the main one")


class EncodeSettings(DataSettings):
    """Encode every picture once; stage 2 reads the cache."""

    source: tyro.conf.Positional[Source] = Field(description="shapes, a folder of pictures, or a data.json")
    vae: Path = Field(description="autoencoder (a diffusers folder)")
    out: Path = Field(description="folder of the cache")
    flip: bool = Field(False, description="cache mirror images too")
    batch_size: int = Field(128, ge=1, description="pictures encoded at once")
    shard_size: int = Field(16_384, ge=1, description="pictures in one shard")
    seed: int = Field(0, ge=0, description="seed of a procedural source")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is good at it")
    fresh: bool = Field(False, description="encode again even if the cache is complete")
