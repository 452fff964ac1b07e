"""Normalizing flows: invertible networks that turn latents, or small pictures, into N(0, I) and tell their density.

By the change of variables log p(z) = log N(f(z); 0, I) + log |det df/dz| (Rezende & Mohamed 2015). The layers are
zuko's. A flow is computed in single precision whatever surrounds it: in half of it an inverse is none.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calotype.checkpoint import publish
from calotype.density.vectors import network
from calotype.errors import UserError
from calotype.randomness import key
from calotype.weights import read_json, refuse_non_finite

Kind = Literal["realnvp", "glow", "nsf", "ffjord"]
DEPTH = {"realnvp": 8, "glow": 8, "nsf": 6, "ffjord": 1}  # couplings, steps a level, couplings, integrals
_WEIGHTS = "model.safetensors"
_LEAST_STD = 1e-2  # of an element that hardly varies


@dataclass(frozen=True)
class FlowFacts:
    """What a saved flow is: its architecture, and what it is a density of."""

    kind: Kind
    shape: tuple[int, int, int]  # (c, h, w) of latents, or (C, H, W) of pictures
    of: Literal["latents", "pixels"]
    width: int
    depth: int
    classes: tuple[str, ...] = ()  # names, where it is conditional
    noise: float = 0.0  # standard deviation of what was added to latents, whose density it then is
    vae: str = ""  # hash of the autoencoder of the latents
    fingerprint: str = ""  # of the data
    image_size: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name in ("shape", "classes", "image_size"):  # JSON knows lists alone
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def dimensions(self) -> int:
        """Numbers of one example."""
        return math.prod(self.shape)


class Flow(nn.Module):
    """An invertible network eps = f(z | y) for latents or pictures z (B, c, h, w) and class ids y (B,)."""

    def __init__(self, facts: FlowFacts):
        super().__init__()
        self.facts = facts
        self.register_buffer("mean", torch.zeros(facts.shape))
        self.register_buffer("std", torch.ones(facts.shape))
        self.register_buffer("log_shares", torch.zeros(max(len(facts.classes), 1)))
        self.net = network(facts.kind, facts.shape, len(facts.classes), facts.width, facts.depth)

    @property
    def kind(self) -> Kind:
        """Which of the four it is."""
        return self.facts.kind

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        return self.facts.shape

    @property
    def classes(self) -> int:
        """How many classes it can be told; 0 where it is told none."""
        return len(self.facts.classes)

    @torch.no_grad()
    def initialize(self, z: Tensor, y: Tensor | None, shares: Sequence[float] = ()) -> None:
        """Standardise by examples z (B, c, h, w) and let normalising layers begin with them (Kingma & Dhariwal 2018).

        `shares` are those of the classes, for the mixture over them.
        """
        std, mean = torch.std_mean(z, dim=0)
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(_LEAST_STD))
        if shares:
            self.log_shares.copy_(torch.tensor(shares).clamp_min(1e-12).log())
        self.net.initialize((z - self.mean) / self.std, self._context(y))

    def forward(self, z: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """eps (B, c, h, w) and log |det d eps / dz| (B,)."""
        with torch.autocast(z.device.type, enabled=False):
            eps, ladj = self.net((z.float() - self.mean) / self.std, self._context(y))
        return eps, ladj - self.std.log().sum()

    def inverse(self, eps: Tensor, y: Tensor | None = None) -> Tensor:
        """z (B, c, h, w) of eps: one evaluation, but for a continuous flow, which integrates back."""
        with torch.autocast(eps.device.type, enabled=False):
            return self.net.inverse(eps.float(), self._context(y)) * self.std + self.mean

    def log_prob(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(z | y) (B,) in nats; of a conditional flow without y the mixture, sum over y of p(y) p(z | y)."""
        if y is None and self.classes:
            each = [self.log_prob(z, torch.full((len(z),), k, device=z.device)) for k in range(self.classes)]
            return (torch.stack(each) + self.log_shares[:, None]).logsumexp(0)
        eps, ladj = self(z, y)
        return log_normal(eps) + ladj

    def _context(self, y: Tensor | None) -> Tensor | None:
        """What zuko calls the context (B, classes)."""
        if not self.classes:
            return None
        assert y is not None, "a conditional flow is told a class; log_prob alone can go without"
        return F.one_hot(y, self.classes).float()


def log_normal(eps: Tensor) -> Tensor:
    """log N(eps; 0, I) (B,) in nats of eps (B, ...)."""
    eps = eps.flatten(1)
    return -0.5 * (eps.square().sum(1) + eps.shape[1] * math.log(2 * math.pi))


def bits_per_dim(log_prob: Tensor, dimensions: int) -> Tensor:
    """Bits per dimension of log-densities in nats."""
    return -log_prob / (dimensions * math.log(2))


def build(facts: FlowFacts, seed: int) -> Flow:
    """A fresh flow, the same for the same seed; raises UserError where zuko is missing."""
    refuse_missing_zuko("--kind " + facts.kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "flow/init"))
        return Flow(facts)


def refuse_missing_zuko(what: str) -> None:
    """Raise UserError unless the extra [flows] is installed."""
    try:
        import zuko  # noqa: F401
    except ImportError:
        raise UserError(f"{what} needs the package zuko; pip install 'calotype[flows]'.") from None


# On disk


def save_flow(flow: Flow, folder: Path) -> None:
    """Write config.json and the weights into a folder, beside its place and renamed."""
    temporary = folder.with_name(f".{folder.name}")
    temporary.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous().cpu() for name, value in flow.state_dict().items()}
    save_file(tensors, temporary / _WEIGHTS)
    (temporary / "config.json").write_text(json.dumps(asdict(flow.facts), indent=1, ensure_ascii=False))
    publish(temporary, folder)


def load_flow(folder: Path, flag: str) -> Flow:
    """A saved flow, ready to evaluate; raises UserError that begins with the flag."""
    refuse_missing_zuko(f"{flag} {folder}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{flag} {folder} is not a saved flow (it holds no config.json); run `calotype train-flow`.")
    config = read_json(folder / "config.json", flag)
    try:
        facts = FlowFacts(**{field.name: config[field.name] for field in fields(FlowFacts)})
        flow = build(facts, 0)
        flow.load_state_dict(load_file(folder / _WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"{flag} {folder} cannot be loaded ({first}); run `calotype train-flow` again.") from None
    refuse_non_finite(flow, f"{flag} {folder}")
    return flow.eval().requires_grad_(False)
