"""Bounds on log p(x) of a model p(x|z) p(z) with normal posteriors q(z|x), from samples of z.

A log-weight is log p(x|z) + log p(z) - log q(z|x) at a z drawn from q(z|x). The mean of log-weights is the evidence
lower bound; the log of the mean weight is a tighter one that reaches log p(x) as samples grow (Burda et al. 2016). Both
are in nats, and stay what they are where z is shifted and scaled: both densities of z change by the same factor.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence


class Model(NamedTuple):
    """What a bound needs of a model: q(z|x) with mean (B, ...), p(z) that broadcasts to it, and log p(x|z) (B,)."""

    posterior: Callable[[Tensor], Normal]
    prior: Normal
    log_likelihood: Callable[[Tensor, Tensor], Tensor]  # of z and x


def log_weights(model: Model, x: Tensor, noise: Iterable[Tensor]) -> Tensor:
    """Log-weights (K, B) in nats of examples x (B, ...), one sample of z for each of K standard normal eps."""
    q = model.posterior(x)
    samples = ((eps, q.mean + q.stddev * eps) for eps in noise)
    return torch.stack([model.log_likelihood(z, x) - log_ratio(q, model.prior, eps) for eps, z in samples])


def log_ratio(q: Normal, p: Normal, eps: Tensor) -> Tensor:
    """log q(z) - log p(z) (B,) in nats at z = mean + std * eps of q; the mean over eps estimates KL(q || p)."""
    # From eps itself and not from (z - mean) / std, which loses every digit of a narrow posterior.
    log_q = Normal(0.0, 1.0).log_prob(eps) - q.stddev.log()
    return (log_q - p.log_prob(q.mean + q.stddev * eps)).flatten(1).sum(1)


def elbo(weights: Tensor) -> Tensor:
    """The evidence lower bound (B,) in nats from log-weights (K, B) (Kingma & Welling 2014)."""
    return weights.mean(0)


def importance_weighted(weights: Tensor) -> Tensor:
    """The importance-weighted bound (B,) in nats from log-weights (K, B) (Burda et al. 2016, eq. 8)."""
    return weights.logsumexp(0) - math.log(len(weights))


def rate(q: Normal, p: Normal) -> Tensor:
    """KL(q || p) (B,) in nats, in closed form, summed over all that follows the first dimension of q."""
    return kl_divergence(q, p).flatten(1).sum(1)
