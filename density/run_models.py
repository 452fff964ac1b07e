"""The models of a run that know a likelihood, and what each says of pictures, picture by picture."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.distributions import Normal

from calotype import device
from calotype.autoencoder import Facts, Vae, decode, load_autoencoder, posterior, read_facts
from calotype.bounds import Model, log_weights
from calotype.checkpoint import weights_hash
from calotype.density import diffusion
from calotype.density.flows import Flow, load_flow
from calotype.disk import sha256
from calotype.errors import UserError
from calotype.latent_variables import model_of, refuse_odd_facts
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.model_folder import load
from calotype.pipeline.order import Label
from calotype.randomness import normal


class Code(NamedTuple):
    """q(z|x) of pictures, mean and deviation (B, c, h, w), and one sample z of it; no deviation where it is a point."""

    mean: Tensor
    std: Tensor | None
    z: Tensor


class RunModels:
    """Autoencoder, flow and diffusion model of a run; None for what it has not."""

    def __init__(self, run: Path, vae: Vae, facts: Facts, flow: Flow | None, pipe: LatentDiffusionPipeline | None):
        self.run, self.vae, self.facts, self.flow, self.pipe = run, vae, facts, flow, pipe
        self.precision = "fp32"

    @classmethod
    def open(cls, run: Path, precision: str = "fp32") -> Self:
        """The models of a run folder, on their device; raises UserError."""
        folder = find_autoencoder(run)
        vae = load_autoencoder(folder, "RUN").to(device.device())
        device.for_drawing(vae)
        facts = read_facts(folder)
        if facts.likelihood:
            refuse_odd_facts(f"RUN {folder}", vae, facts)
        found = cls(run, vae, facts, _flow(run, folder), _pipe(run, folder))
        found.precision = precision
        return found

    def encode(self, x: Tensor, seed: int = 0, first: int = 0) -> Code:
        """The code of pictures x (B, C, H, W) in [-1, 1]; the noise of z follows from the seed and their places."""
        with device.autocast(self.precision):
            q = posterior(self.vae, x)
        if "std" not in q:
            return Code(q["mean"], None, q["mean"])
        return Code(**q, z=q["mean"] + q["std"] * noise_of(q["mean"], seed, first, 0))

    def weights(self, x: Tensor, code: Code, seed: int = 0, first: int = 0, samples: int = 64) -> Tensor:
        """Log-weights (K, B) in nats of `calotype.bounds`, in double; the first of each belongs to `code.z`."""
        noise = (noise_of(code.mean, seed, first, k) for k in range(samples))
        return log_weights(self.model(code), x, noise).cpu().double()

    def model(self, code: Code) -> Model:
        """The latent-variable model whose likelihood the facts name, of pictures whose code is known."""
        return model_of(self.vae, self.facts, lambda x: Normal(code.mean, code.std), self._decode)

    def flow_log_prob(self, z: Tensor, labels: list[str] | None = None) -> Tensor:
        """log p(z), or log p(z | label), (B,) in nats under the flow of latents, or of pictures z in [-1, 1]."""
        assert self.flow is not None
        y = None if labels is None else torch.tensor([self.flow_classes[label] for label in labels], device=z.device)
        return self.flow.log_prob(z, y).double().cpu()

    @cached_property
    def flow_classes(self) -> dict[str, int]:
        """The classes that the flow can be told, by name."""
        return {name: i for i, name in enumerate(self.flow.facts.classes)} if self.flow else {}

    def diffusion_log_prob(
        self,
        z: Tensor,
        labels: list[Label] | None = None,
        way: diffusion.Way = diffusion.DEFAULT,
        positions: Sequence[int] | None = None,
    ) -> Tensor:
        """log p(z), or log p(z | label), (B,) in nats under the diffusion model; see `diffusion.density_of`."""
        assert self.pipe is not None
        return diffusion.log_prob(self.pipe, z, labels, way, positions)

    def _decode(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        with device.autocast(self.precision):
            return decode(self.vae, z, size).clamp(-1, 1)


def noise_of(like: Tensor, seed: int, first: int, k: int) -> Tensor:
    """Noise for the k-th sample of z, of pictures from the place `first` on: more samples go on where fewer ended."""
    return normal(seed, f"importance {k}", first, len(like), tuple(like.shape[1:])).to(like.device)


def find_autoencoder(run: Path) -> Path:
    """The folder of a run's autoencoder; raises UserError."""
    for folder in (run / "stage1_vae" / "vae", run / "pipeline" / "vae"):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"RUN {run} holds no autoencoder; give the folder of a run that reached `calotype train-vae`.")


def _flow(run: Path, vae: Path) -> Flow | None:
    """The flow of a run, where it has one that is finished."""
    folder = run / "flow" / "prior"
    if not (folder / "config.json").is_file():
        return None
    flow = load_flow(folder, "RUN").to(device.device())
    if flow.facts.of == "latents" and flow.facts.vae != weights_hash(vae):
        raise UserError(f"RUN: {folder} is a flow of another autoencoder's latents; run `calotype train-flow` again.")
    return flow


def _pipe(run: Path, vae: Path) -> LatentDiffusionPipeline | None:
    """The diffusion model of a run, where it has one."""
    if not (run / "pipeline" / "model_index.json").is_file():
        return None
    if _weights(run / "pipeline" / "vae") != _weights(vae):
        raise UserError(f"RUN: {run / 'pipeline'} holds another autoencoder than {vae}; run `calotype export` again.")
    return load(run)


def _weights(folder: Path) -> list[str]:
    """SHA-256 of the weights alone: exporting may say more in config.json."""
    return [sha256(file) for file in sorted(folder.glob("*.safetensors"))]
