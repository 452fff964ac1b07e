"""Steps of stage 1 as they are usually written, to compare ours with: stock models, default AdamW, fp32."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn


class Plain:
    """Mean squared error and a weighted KL."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float):
        self.vae, self.kl_weight = vae, kl_weight
        self.optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4)

    def gradients(self, x: Tensor, eps: Tensor) -> None:
        """Add up the gradients for pictures x (B, C, H, W) and noise eps (B, c, h, w)."""
        x_hat, kl = reconstruct(self.vae, x, eps)
        (F.mse_loss(x_hat, x) + self.kl_weight * kl).backward()

    def step(self, x: Tensor, eps: Tensor) -> None:
        """One step."""
        self.gradients(x, eps)
        self.optimizer.step()
        self.optimizer.zero_grad()


class TwoPass:
    """The adversarial step of latent diffusion (Rombach et al. 2022, after Esser et al. 2021): a pass for each side.

    Its loss module measures the perceptual distance before it asks whose turn it is, so both passes pay for it. Its
    trainer switches off the gradients of the side whose turn it is not, which is done here too.
    """

    def __init__(self, vae: AutoencoderKL, critic: nn.Module, lpips: nn.Module, kl_weight: float, weight: float):
        self.vae, self.critic, self.lpips = vae, critic, lpips
        self.kl_weight, self.weight = kl_weight, weight
        self.optimizers = [torch.optim.AdamW(side.parameters(), lr=1e-4) for side in (vae, critic)]

    def step(self, x: Tensor, eps: Tensor) -> None:
        """One step of each side."""
        for gradients, optimizer in zip((self.of_autoencoder, self.of_critic), self.optimizers, strict=True):
            gradients(x, eps)
            optimizer.step()
            optimizer.zero_grad()

    def of_autoencoder(self, x: Tensor, eps: Tensor) -> None:
        """Add up the gradients of the autoencoder, with an adaptive weight from two walks to its last layer."""
        self._turn_of(self.vae)
        x_hat, kl = reconstruct(self.vae, x, eps)
        fidelity, adversarial = self._fidelity(x_hat, x), -self.critic(x_hat).mean()
        last = self.vae.decoder.conv_out.weight
        norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (fidelity, adversarial)]
        adaptive = (norms[0] / (norms[1] + 1e-8)).detach()
        (fidelity + self.kl_weight * kl + self.weight * adaptive * adversarial).backward()

    def of_critic(self, x: Tensor, eps: Tensor) -> None:
        """Add up the gradients of the discriminator."""
        self._turn_of(self.critic)
        x_hat, _ = reconstruct(self.vae, x, eps)
        self._fidelity(x_hat, x)
        real, fake = self.critic(x), self.critic(x_hat.detach())
        (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()

    def _fidelity(self, x_hat: Tensor, x: Tensor) -> Tensor:
        return F.l1_loss(x_hat, x) + self.lpips(x, x_hat).mean()

    def _turn_of(self, side: nn.Module) -> None:
        for module in (self.vae, self.critic):
            module.requires_grad_(module is side)


def reconstruct(vae: AutoencoderKL, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """x_hat (B, C, H, W), and KL in nats per value of a picture."""
    posterior = vae.encode(x).latent_dist
    x_hat = vae.decode(posterior.mean + posterior.std * eps).sample
    return x_hat, posterior.kl().mean() / x[0].numel()
