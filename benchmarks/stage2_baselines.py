"""Stage 2 as it is usually trained, to compare ours with: stock networks, fp32, pictures read and encoded in each step.

`Original` follows the trainer of latent diffusion (Rombach et al. 2022), `Diffusers` the text-to-image example of
diffusers. Both take the same UNet, autoencoder and files as ours; both are written afresh.
"""

from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn

from calotype.device import accelerator, device

_TIMES = 1000
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # of both


class Recipe:
    """What both have in common: files of pictures, a frozen autoencoder, a UNet that is told a class or nothing."""

    def __init__(self, unet: UNet2DModel, vae: AutoencoderKL, files: list[Path], batch: int):
        self.unet = copy_of(unet).to(device()).train()
        self.vae = copy_of(vae).to(device()).eval().requires_grad_(False)
        self.files, self.batch = cycle(files), batch
        self.classes = unet.config.num_class_embeds

    def read(self) -> Tensor:
        """The next pictures (B, C, H, W) in [-1, 1], decoded from their files."""
        pictures = [np.asarray(Image.open(file).convert("RGB")) for file in islice(self.files, self.batch)]
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        return x.to(device(), non_blocking=True).float().div(127.5).sub(1)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, c, h, w) out of the autoencoder's posterior."""
        return self.vae.encode(x).latent_dist.sample()

    def step(self) -> None:
        """One whole step."""
        self.train(self.encode(self.read()))

    def train(self, z: Tensor) -> None:
        """The step from latents (B, c, h, w) on."""
        raise NotImplementedError

    def labels(self) -> Tensor | None:
        """Class ids (B,), where the UNet wants them."""
        return torch.randint(self.classes, (self.batch,), device=device()) if self.classes else None


class Original(Recipe):
    """Noise by its own table, attention by hand."""

    def __init__(self, unet: UNet2DModel, vae: AutoencoderKL, files: list[Path], batch: int):
        super().__init__(unet, vae, files, batch)
        for module in self.unet.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(AttnProcessor())
        self.update = OriginalUpdate(self.unet)
        betas = torch.linspace(_BETAS["beta_start"] ** 0.5, _BETAS["beta_end"] ** 0.5, _TIMES, dtype=torch.float64) ** 2
        alpha_bar = (1 - betas).cumprod(0)
        self.alpha, self.sigma = (v.sqrt().float().to(device()) for v in (alpha_bar, 1 - alpha_bar))

    def train(self, z: Tensor) -> None:
        """The step from latents (B, c, h, w) on."""
        t = torch.randint(_TIMES, (len(z),), device=z.device)
        eps = torch.randn_like(z)
        z_t = self.alpha[t][:, None, None, None] * z + self.sigma[t][:, None, None, None] * eps
        errors = F.mse_loss(self.unet(z_t, t, class_labels=self.labels()).sample, eps, reduction="none")
        errors.mean((1, 2, 3)).mean().backward()
        self.update()


class Diffusers(Recipe):
    """accelerate and DDPMScheduler; the loss is read in each step."""

    def __init__(self, unet: UNet2DModel, vae: AutoencoderKL, files: list[Path], batch: int):
        super().__init__(unet, vae, files, batch)
        self.update = DiffusersUpdate(self.unet)
        self.scheduler = DDPMScheduler(num_train_timesteps=_TIMES, **_BETAS)

    def train(self, z: Tensor) -> None:
        """The step from latents (B, c, h, w) on."""
        eps = torch.randn_like(z)
        t = torch.randint(_TIMES, (len(z),), device=z.device)
        z_t = self.scheduler.add_noise(z, eps, t)
        prediction = self.update.prepared(z_t, t, class_labels=self.labels()).sample
        loss = F.mse_loss(prediction.float(), eps.float())
        self.update.accelerator.gather(loss.repeat(len(z))).mean().item()
        self.update.accelerator.backward(loss)
        self.update()


class OriginalUpdate:
    """AdamW as torch gives it, no clipping, and the average of the weights a parameter at a time (LitEma)."""

    def __init__(self, network: nn.Module):
        self.network, self.updates = network, 0
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        self.averages = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def __call__(self) -> None:
        """What follows the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        decay = min(0.9999, (1 + self.updates) / (10 + self.updates))
        for name, p in self.network.named_parameters():
            self.averages[name].sub_((1 - decay) * (self.averages[name] - p))


class DiffusersUpdate:
    """Clipping by accelerate, AdamW and EMAModel with their defaults."""

    def __init__(self, network: nn.Module):
        self.network, self.accelerator = network, accelerator("fp32")
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        schedule = get_scheduler("constant", optimizer)
        self.prepared, self.optimizer, self.schedule = self.accelerator.prepare(network, optimizer, schedule)
        self.ema = EMAModel(network.parameters())
        self.averages = dict(enumerate(self.ema.shadow_params))

    def __call__(self) -> None:
        """What follows the gradients."""
        self.accelerator.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())


def copy_of(network: nn.Module) -> nn.Module:
    """A stock network of the same config and weights: none of our choices of kernels goes along."""
    copied = type(network).from_config(network.config)
    copied.load_state_dict(network.state_dict())
    return copied
