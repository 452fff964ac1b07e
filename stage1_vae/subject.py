"""A saved autoencoder under examination: what it makes of pictures, and the model p(x|z) p(z) that it stands for."""

from pathlib import Path
from typing import NamedTuple, Self

from diffusers import VQModel
from torch import Tensor
from torch.distributions import Normal

from calotype import device
from calotype.autoencoder import Facts, Vae, decode, load_autoencoder, posterior, read_facts
from calotype.bounds import Model
from calotype.errors import UserError
from calotype.latent_variables import model_of, prior_of, refuse_odd_facts
from calotype.stage1_vae.tokens import token_numbers

_NO_NOISE = 1e-4  # a posterior narrower than this everywhere is that of an autoencoder without one


class Code(NamedTuple):
    """Latents (B, c, h, w) of pictures; for KL their deviation too, for VQ the numbers (B, h, w) of the codes."""

    mean: Tensor
    std: Tensor | None = None
    numbers: Tensor | None = None


class Subject:
    """An autoencoder, its facts and the precision in which it runs; latents are in the coordinates it was saved in."""

    def __init__(self, folder: Path, vae: Vae, facts: Facts, precision: str):
        self.folder, self.vae, self.facts, self.precision = folder, vae, facts, precision

    @classmethod
    def open(cls, folder: Path, precision: str) -> Self:
        """The autoencoder of a folder, on its device; raises UserError."""
        vae = load_autoencoder(folder, "--vae").to(device.device())
        device.for_drawing(vae)
        facts = read_facts(folder)
        if facts.likelihood:
            refuse_odd_facts(f"--vae {folder}", vae, facts)
        return cls(folder, vae, facts, precision)

    @property
    def quantised(self) -> bool:
        """Whether the latents are vectors of a codebook."""
        return isinstance(self.vae, VQModel)

    @property
    def prior(self) -> Normal:
        """p(z) of training with mean and deviation (c, 1, 1); N(0, I) where the facts do not name one."""
        return prior_of(self.vae, self.facts)

    def encode(self, x: Tensor) -> Code:
        """The code of pictures x (B, C, H, W) in [-1, 1]."""
        with device.autocast(self.precision):
            if not self.quantised:
                return Code(**posterior(self.vae, x))
            numbers = token_numbers(self.vae, x)
        return Code(self.vae.quantize.embedding(numbers).permute(0, 3, 1, 2), numbers=numbers)

    def decode(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        """Pictures (B, C, *size), clamped to [-1, 1], of latents (B, c, h, w)."""
        with device.autocast(self.precision):
            return decode(self.vae, z, size).clamp(-1, 1)

    def posterior(self, x: Tensor) -> Normal:
        """q(z|x) of a KL autoencoder, mean (B, c, h, w)."""
        code = self.encode(x)
        return Normal(code.mean, code.std)

    def model(self) -> Model:
        """The latent-variable model whose likelihood the facts name."""
        return model_of(self.vae, self.facts, self.posterior, self.decode)


def has_noise(std: Tensor | None) -> bool:
    """Whether a posterior of this deviation is one at all, so that KL(q || p) means something."""
    return std is not None and bool((std > _NO_NOISE).any())


def refuse_strangers(subjects: list[Subject]) -> None:
    """Raise UserError unless all are seeds of one model: the same architecture and likelihood."""
    first, *others = subjects
    for other in others:
        if _kind(other) != _kind(first):
            raise UserError(
                f"--vae {other.folder} is not another seed of {first.folder}: architecture or likelihood differ; "
                "evaluate them one by one."
            )


def _kind(subject: Subject) -> tuple:
    config = {name: value for name, value in subject.vae.config.items() if not name.startswith("_")}
    return type(subject.vae), config, subject.facts.likelihood
