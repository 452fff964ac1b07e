"""What keeps the latents in order: nothing, a Kullback-Leibler term, or a codebook.

Each maps the encoder's output h and noise eps to the latent z that is decoded and a penalty (B,) for each example.
"""

import math

import torch
from torch import Tensor, nn


class Identity(nn.Module):
    """A plain autoencoder: z is the mean that the encoder gives, and nothing is asked of it."""

    name = "none"
    fixed_log_variance = -30.0  # what the saved encoder reports: none at all

    def forward(self, h: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """h (B, 2c, h, w): mean and log-variance, the second unused."""
        mean, _ = h.chunk(2, dim=1)
        return mean, mean.new_zeros(len(mean))


class KL(nn.Module):
    """KL(q(z|x) || N(0, I)) in nats, summed over the latent (Kingma & Welling 2014, appendix B).

    With a fixed posterior standard deviation only the mean is learnt and the term is a quadratic pull on it.
    """

    name = "kl"

    def __init__(self, posterior_std: float | None = None):
        super().__init__()
        self.fixed_log_variance = None if posterior_std is None else 2 * math.log(posterior_std)

    def forward(self, h: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """h (B, 2c, h, w): mean and log-variance; z = mean + std * eps (reparameterisation)."""
        mean, logvar = h.chunk(2, dim=1)
        if self.fixed_log_variance is not None:
            logvar = torch.full_like(mean, self.fixed_log_variance)
        logvar = logvar.clamp(-30, 20)  # as diffusers' DiagonalGaussianDistribution does
        z = mean + torch.exp(0.5 * logvar) * eps
        return z, 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


class VectorQuantization(nn.Module):
    """The nearest vector of a codebook, with a straight-through gradient (van den Oord et al. 2017, eq. 3)."""

    name = "vq"

    def __init__(self, embedding: nn.Embedding, commitment: float):
        super().__init__()
        self.embedding, self.commitment = embedding, commitment

    def forward(self, h: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """h (B, c, h, w); eps is not used."""
        e = self.lookup(self.indices(h))
        codebook = (e - h.detach()).square().flatten(1).mean(1)
        commitment = (e.detach() - h).square().flatten(1).mean(1)
        return h + (e - h).detach(), codebook + self.commitment * commitment

    @torch.no_grad()
    def indices(self, h: Tensor) -> Tensor:
        """Numbers (B, h, w) of the nearest code vectors."""
        flat = h.permute(0, 2, 3, 1).reshape(-1, h.shape[1])
        with torch.autocast(h.device.type, enabled=False):  # near codes must not be confused by bf16
            distance = torch.cdist(flat.float(), self.embedding.weight)
        return distance.argmin(1).reshape(len(h), *h.shape[2:])

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors (B, c, h, w) of numbers (B, h, w)."""
        return self.embedding(indices).permute(0, 3, 1, 2)

    @torch.no_grad()
    def start_from(self, h: Tensor, generator: torch.Generator) -> None:
        """Begin with vectors that the untrained encoder really gives, slightly apart; h (B, c, h, w)."""
        flat = h.permute(0, 2, 3, 1).reshape(-1, h.shape[1])
        picked = flat[torch.randint(len(flat), (self.embedding.num_embeddings,), generator=generator)]
        noise = torch.randn(picked.shape, generator=generator)
        self.embedding.weight.copy_(picked + 0.01 * flat.std() * noise)
