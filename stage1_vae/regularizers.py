"""What keeps the latents in order: nothing, a Kullback-Leibler term, a codebook, or a grid.

Each maps the encoder's output h and noise eps to the latent z that is decoded and its terms of the loss, by name, one
value (B,) for each example. `after_step` is called once an optimiser step, when every micro-batch has been seen; `good`
(a boolean tensor) says whether the step was taken or left out because its gradient was not finite.
"""

import math

import torch
from accelerate.utils import gather, reduce
from torch import Tensor, nn

from calotype.stage1_vae.whitening import Whitening, moments, statistics

Terms = dict[str, Tensor]


class Identity(nn.Module):
    """A plain autoencoder: z is the mean that the encoder gives, and nothing is asked of it."""

    name = "none"
    fixed_log_variance = -30.0  # what the saved encoder reports: none at all

    def forward(self, h: Tensor, eps: Tensor) -> tuple[Tensor, Terms]:
        """h (B, 2c, h, w): mean and log-variance, the second unused."""
        return self.mode(h), {}

    def mode(self, h: Tensor) -> Tensor:
        """z without noise."""
        return h.chunk(2, dim=1)[0]

    def after_step(self, good: Tensor) -> None:
        """Nothing to do."""


class KL(nn.Module):
    """KL(q(z|x) || N(0, I)) in nats, summed over the latent (Kingma & Welling 2014, appendix B).

    With a fixed posterior standard deviation only the mean is learnt and the term is a quadratic pull on it. With
    `free_bits` each element of the latent may hold that many nats for nothing (Kingma et al. 2016, section 5.2): its
    term is max(free_bits, KL_j), where KL_j is the mean over the batch of all processes (`per_sample` False, the
    paper's form: an element that is used on average is pulled everywhere) or the example's own (`per_sample` True: each
    example has its own allowance).
    """

    name = "kl"

    def __init__(self, posterior_std: float | None = None, free_bits: float = 0.0, per_sample: bool = False):
        super().__init__()
        self.fixed_log_variance = None if posterior_std is None else 2 * math.log(posterior_std)
        self.free_bits, self.per_sample = free_bits, per_sample

    def forward(self, h: Tensor, eps: Tensor) -> tuple[Tensor, Terms]:
        """h (B, 2c, h, w): mean and log-variance; z = mean + std * eps (reparameterisation)."""
        z, terms = self._sample(h, eps)
        return z, {"kl": self._above_the_floor(terms).flatten(1).sum(1)}

    def mode(self, h: Tensor) -> Tensor:
        """z without noise: the posterior's mean."""
        return h.chunk(2, dim=1)[0]

    def sample(self, h: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, c, h, w) of the posterior, and KL(q || p) (B,) in nats without free bits."""
        z, terms = self._sample(h, eps)
        return z, terms.flatten(1).sum(1)

    def after_step(self, good: Tensor) -> None:
        """Nothing to do."""

    def _sample(self, h: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = h.chunk(2, dim=1)
        if self.fixed_log_variance is not None:
            logvar = torch.full_like(mean, self.fixed_log_variance)
        logvar = logvar.clamp(-30, 20)  # as diffusers' DiagonalGaussianDistribution does
        return mean + torch.exp(0.5 * logvar) * eps, 0.5 * (mean**2 + logvar.exp() - 1 - logvar)

    def _above_the_floor(self, terms: Tensor) -> Tensor:
        """max(free_bits, KL_j) for the terms (B, c, h, w); the gradient below the floor is exactly zero."""
        if not self.free_bits:
            return terms
        level = terms if self.per_sample else reduce(terms.detach().mean(0, keepdim=True), "mean")
        return torch.where(level > self.free_bits, terms, torch.full_like(terms, self.free_bits))


class VectorQuantization(nn.Module):
    """The nearest vector of a codebook, with a straight-through gradient (van den Oord et al. 2017, eq. 3).

    The codebook is no parameter: each vector is the running mean of the encoder's outputs that chose it (their
    appendix A.1), over all processes. A vector that is hardly chosen is moved to an output of the current batch
    (Dhariwal et al. 2020), picked by the keyed noise, so that every process moves it to the same place.
    """

    name = "vq"
    decay = 0.98
    revive_below = 0.03  # of the share that each vector would have if all were chosen equally

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.embedding = embedding.requires_grad_(False)
        self.average = CodebookAverage(embedding.weight)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, h: Tensor, eps: Tensor) -> tuple[Tensor, Terms]:
        """h (B, c, h, w); eps (B, c, h, w) only decides where dead vectors move to."""
        numbers = self.indices(h)
        e = self.lookup(numbers)
        if self.training and torch.is_grad_enabled():
            self.seen.append((_rows(h.detach()), numbers.flatten(), eps[:, 0].flatten()))
        return h + (e - h).detach(), {"commitment": (e - h).square().flatten(1).mean(1)}

    def mode(self, h: Tensor) -> Tensor:
        """The nearest code vectors (B, c, h, w)."""
        return self.lookup(self.indices(h))

    def indices(self, h: Tensor) -> Tensor:
        """Numbers (B, h, w) of the nearest code vectors."""
        return nearest(h, self.embedding.weight)

    def lookup(self, numbers: Tensor) -> Tensor:
        """Code vectors (B, c, h, w) of numbers (B, h, w)."""
        return self.embedding(numbers).permute(0, 3, 1, 2)

    @torch.no_grad()
    def after_step(self, good: Tensor) -> None:
        """Move the codebook after an optimiser step; after one that was left out everything is as it was."""
        rows, numbers, priority = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        self.seen.clear()
        kept = [self.embedding.weight, *self.average.buffers()]
        before = [tensor.clone() for tensor in kept]
        counts, sums = (reduce(total, "sum") for total in _totals(rows, numbers, self.embedding.num_embeddings))
        self.average.update(counts, sums, self.decay)
        self.embedding.weight.copy_(self.average.codes())
        self._revive(gather(rows), gather(priority))
        for tensor, was in zip(kept, before):  # undone and not left undone, so that a GPU is not waited for
            tensor.copy_(torch.where(good, tensor, was))

    @torch.no_grad()
    def start_from(self, h: Tensor, generator: torch.Generator, rounds: int = 10) -> None:
        """Begin with the k-means centres (Lloyd's iterations) of what the untrained encoder gives; h (B, c, h, w)."""
        rows = _rows(h)
        count = self.embedding.num_embeddings
        picked = torch.randperm(len(rows), generator=generator)[:count]
        centres = rows[picked.repeat(-(-count // len(picked)))[:count]]
        for _ in range(rounds):
            sizes, sums = _totals(rows, torch.cdist(rows, centres).argmin(1), count)
            centres = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp_min(1), centres)
        self.embedding.weight.copy_(centres)
        self.average.restart(self.embedding.weight)

    def _revive(self, rows: Tensor, priority: Tensor) -> None:
        """Shapes do not depend on how many are dead, so that a GPU is not waited for."""
        count = self.embedding.num_embeddings
        picked = priority.topk(min(count, len(rows))).indices
        fresh = rows[picked.repeat(-(-count // len(picked)))[:count]]
        dead = self.average.counts < self.revive_below
        self.embedding.weight.copy_(torch.where(dead[:, None], fresh, self.embedding.weight))
        self.average.replace(dead, fresh)


class CodebookAverage(nn.Module):
    """How often each code vector is chosen (K,), and the sum of what chose it (K, c), as running averages."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("counts", torch.ones(len(weight)))
        self.register_buffer("sums", weight.detach().clone())

    def restart(self, codes: Tensor) -> None:
        """As if each vector had been chosen once."""
        self.counts.fill_(1.0)
        self.sums.copy_(codes)

    def update(self, counts: Tensor, sums: Tensor, decay: float) -> None:
        """Take in the choices of one step."""
        scale = len(self.counts) / counts.sum().clamp_min(1)  # so that a count of 1 is an equal share
        self.counts.lerp_(counts * scale, 1 - decay)
        self.sums.lerp_(sums * scale, 1 - decay)

    def codes(self) -> Tensor:
        """The vectors (K, c)."""
        return self.sums / self.counts.clamp_min(1e-6)[:, None]

    def replace(self, dead: Tensor, codes: Tensor) -> None:
        """Give the vectors where `dead` (K,) is true a new place (K, c) and an equal share."""
        self.counts.copy_(torch.where(dead, 1.0, self.counts))
        self.sums.copy_(torch.where(dead[:, None], codes, self.sums))


class FiniteScalar(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2024): channel i is rounded to one of `levels[i]` values in [-1, 1].

    The paper bounds with tanh; a clamp does as well and makes the code the nearest point of a grid, so that a stock
    `VQModel` whose codebook is that grid reproduces it. No codebook loss: what keeps the whole grid in use is that
    codes are held white, with a deviation at which the outer levels are met as often as the inner ones.
    """

    name = "fsq"
    std = 1.0

    def __init__(self, embedding: nn.Embedding, levels: tuple[int, ...]):
        super().__init__()
        self.embedding = embedding.requires_grad_(False)
        self.whitening = Whitening(len(levels), self.std)
        self.seen: list[Tensor] = []
        self.register_buffer("steps", (torch.tensor(levels, dtype=torch.float32) - 1).reshape(1, -1, 1, 1) / 2)
        axes = [torch.linspace(-1, 1, level) for level in levels]
        with torch.no_grad():
            embedding.weight.copy_(torch.cartesian_prod(*axes).reshape(-1, len(levels)))

    def forward(self, h: Tensor, eps: Tensor) -> tuple[Tensor, Terms]:
        """h (B, c, h, w); eps is not used. Outside [-1, 1] the gradient is that of the clamp: none."""
        if self.training and torch.is_grad_enabled():
            self.seen.append(_rows(h.detach()))
        bounded = self.whitening(h).clamp(-1, 1)
        return bounded + (self._round(bounded) - bounded).detach(), {}

    def mode(self, h: Tensor) -> Tensor:
        """The nearest points of the grid (B, c, h, w)."""
        return self._round(self.whitening(h).clamp(-1, 1))

    def indices(self, h: Tensor) -> Tensor:
        """Numbers (B, h, w) of those points."""
        return nearest(self.whitening(h), self.embedding.weight)

    @torch.no_grad()
    def after_step(self, good: Tensor) -> None:
        """Take the codes of an optimiser step, over all processes, into the running statistics."""
        found = moments(*(reduce(total, "sum") for total in statistics(torch.cat(self.seen))))
        self.seen.clear()
        held = (self.whitening.mean, self.whitening.covariance)
        taken = (torch.where(good, new, old) for new, old in zip(found, held, strict=True))
        self.whitening.update(*taken, 1 - self.whitening.decay)

    @torch.no_grad()
    def start_from(self, h: Tensor) -> None:
        """Begin with the statistics of what the untrained encoder gives; h (B, c, h, w)."""
        self.whitening.update(*moments(*statistics(_rows(h))), 1.0)

    def _round(self, bounded: Tensor) -> Tensor:
        return ((bounded + 1) * self.steps).round() / self.steps - 1


@torch.no_grad()
def nearest(h: Tensor, codes: Tensor) -> Tensor:
    """Numbers (B, h, w) of the code vectors (K, c) nearest to h (B, c, h, w)."""
    with torch.autocast(h.device.type, enabled=False):  # near codes must not be confused by bf16
        distance = torch.cdist(_rows(h).float(), codes)
    return distance.argmin(1).reshape(len(h), *h.shape[2:])


def _totals(rows: Tensor, numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """How many rows (N, c) chose each number (K,), and their sums (K, c)."""
    sizes = rows.new_zeros(count).index_add_(0, numbers, rows.new_ones(len(rows)))
    return sizes, rows.new_zeros(count, rows.shape[1]).index_add_(0, numbers, rows)


def _rows(h: Tensor) -> Tensor:
    """(B, c, h, w) -> (B h w, c)."""
    return h.permute(0, 2, 3, 1).reshape(-1, h.shape[1])
