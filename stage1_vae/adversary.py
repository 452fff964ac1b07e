"""The adversarial phase: when it begins, its single-pass step, and the guard that ends what it spoils.

Until it begins nothing is different. Then the discriminator learns on the frozen autoencoder, and only after that does
the decoder see it. The state is plain JSON, so that a resumed run knows where it is.
"""

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from calotype import device, loop
from calotype.config import fraction_of
from calotype.randomness import key
from calotype.stage import Review
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.discriminator import PatchDiscriminator, depth_for, gradient_penalty, hinge
from calotype.stage1_vae.models import Reconstruction

_R1_EVERY = 16  # steps; the penalty counts as many times as much (Karras et al. 2020, lazy regularisation)
_PLATEAU_DB, _PLATEAU_FOR = 0.1, 2  # validations in which PSNR gains less than that
_NOISE_DB, _NOISE_PERCEPTUAL = 0.1, 0.01  # dB and share: changes smaller than that are none


class Gradients(NamedTuple):
    """d loss / d x_hat (B, C, H, W) of the two sides that pull at a reconstruction."""

    fidelity: Tensor
    adversarial: Tensor


class Adversary:
    """A patch discriminator, its optimiser and its place in the run."""

    def __init__(self, settings: VaeSettings, channels: int, size: tuple[int, int], accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(settings.seed, "discriminator"))
            discriminator = PatchDiscriminator(channels, 2 * settings.width, depth_for(size))
        self.discriminator = discriminator.to(accelerator.device)
        lr = settings.discriminator_lr or 0.1 * settings.lr
        self.optimizer = loop.make_optimizer(self.discriminator, settings, lr, betas=(0.5, 0.9))
        self.state: dict[str, Any] = {"began": None, "weight": settings.adversarial, "history": [], "good": None}

    def phase(self, step: int) -> str:
        """`waiting`, `pretraining` or `playing`."""
        began = self.state["began"]
        if began is None:
            return "waiting"
        return "pretraining" if step < began + self.settings.adversarial_pretraining else "playing"

    # The step

    def single_pass(
        self, out: Reconstruction, x: Tensor, fidelity: Tensor, last: nn.Parameter, step: int, parts: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar whose gradient is that of fidelity + lambda * adversarial, after one walk through each network.

        Both gradients are taken at x_hat; lambda = |d fidelity / d last| / |d adversarial / d last| (Esser et al. 2021,
        eq. 7), from gradients that are averaged over all processes, at most --adversarial-cap, times the weight. The
        discriminator's own gradients are left in its parameters, from the same logits.
        """
        pulled = [t for t in (out.x_hat, out.log_scale) if t is not None and t.requires_grad]
        at_x_hat, *at_scale = torch.autograd.grad(fidelity, pulled)
        leaf = out.x_hat.detach().requires_grad_()
        fake = self._judge(leaf)
        (adversarial,) = torch.autograd.grad(-fake.mean(), leaf, retain_graph=True)
        figures = self._learn(x, fake, step, parts)
        adaptive = self.adaptive_weight(out.x_hat, last, Gradients(at_x_hat, adversarial))
        surrogate = (out.x_hat * (at_x_hat + self.state["weight"] * adaptive * adversarial)).sum()
        for tensor, gradient in zip(pulled[1:], at_scale):
            surrogate = surrogate + tensor * gradient
        return surrogate, figures | {"adversarial": -fake.detach().mean(), "adaptive_weight": adaptive}

    def adaptive_weight(self, x_hat: Tensor, last: nn.Parameter, gradients: Gradients) -> Tensor:
        """How much louder the reconstruction speaks at the decoder's last layer than the discriminator; capped."""
        at_last = [torch.autograd.grad(x_hat, last, g, retain_graph=True)[0] for g in gradients]
        at_last = self.accelerator.reduce(torch.stack(at_last), "mean")
        norms = at_last.flatten(1).norm(dim=1)
        return (norms[0] / (norms[1] + 1e-8)).clamp(max=self.settings.adversarial_cap)

    def pretrain(self, x_hat: Tensor, x: Tensor, step: int, parts: int) -> dict[str, Tensor]:
        """Gradients of the discriminator alone, for pictures and reconstructions (B, C, H, W) of a frozen decoder."""
        return self._learn(x, self._judge(x_hat), step, parts)

    def update(self) -> Tensor:
        """One step of the discriminator with gradients averaged over the processes; returns their norm."""
        average_gradients(self.accelerator, self.discriminator)
        return loop.update(self.accelerator, self.discriminator, self.optimizer, self.settings.clip)

    def accuracy(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Share (B,) of patches about which the discriminator is right, pictures and reconstructions alike."""
        real, fake = self._judge(x).flatten(1) > 0, self._judge(x_hat).flatten(1) < 0
        return torch.cat([real, fake], dim=1).float().mean(1)

    def _judge(self, x: Tensor) -> Tensor:
        with device.autocast(self.settings.precision):
            return self.discriminator(x).float()

    def _learn(self, x: Tensor, fake: Tensor, step: int, parts: int) -> dict[str, Tensor]:
        real = self._judge(x)
        loss = hinge(real, fake)
        if self.settings.r1 and step % _R1_EVERY == 0:
            loss = loss + 0.5 * _R1_EVERY * self.settings.r1 * gradient_penalty(self.discriminator, x)
        torch.autograd.backward(loss / parts, inputs=list(self.discriminator.parameters()))
        right = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        return {"discriminator": loss.detach(), "discriminator_accuracy": right}

    # The guard

    def review(self, figures: dict[str, float], step: int, progress: float) -> Review:
        """Begin the phase, call a state good, or call for the last good one with half the weight."""
        now = {name: figures[name] for name in ("psnr", "perceptual")}
        phase = self.phase(step)
        if phase == "waiting":
            return self._begin(now, step) if self._is_time(now["psnr"], progress) else Review()
        if phase == "pretraining":
            return Review()
        if fault := self._fault(now):
            self.state["weight"] /= 2
            if self.state["good"] == self.state["before"]:  # back where the discriminator has learnt nothing yet
                self.state["began"] = step
            return Review((f"{fault}; the adversarial weight is halved to {self.state['weight']:.3g}.",), go_back=True)
        self.state["good"] = now
        return Review(good=True)

    def _begin(self, now: dict[str, float], step: int) -> Review:
        self.state |= {"began": step, "before": now, "good": now}
        pretraining = self.settings.adversarial_pretraining
        sentence = (
            f"The adversarial phase begins at {now['psnr']:.2f} dB; the discriminator has {pretraining} steps alone. "
            f"Below {now['psnr'] - self.settings.max_psnr_drop:.2f} dB the run goes back to this state."
        )
        return Review((sentence,), good=True)

    def _is_time(self, psnr: float, progress: float) -> bool:
        history = self.state["history"]
        history.append(psnr)
        if self.settings.adversarial_start != "plateau":
            return progress >= fraction_of(self.settings.adversarial_start)
        earlier, recent = history[:-_PLATEAU_FOR], history[-_PLATEAU_FOR:]
        return bool(earlier) and max(recent) < max(earlier) + _PLATEAU_DB

    def _fault(self, now: dict[str, float]) -> str | None:
        before, good = self.state["before"], self.state["good"]
        drop = before["psnr"] - now["psnr"]
        if not drop <= self.settings.max_psnr_drop:
            return f"PSNR fell {drop:.2f} dB below its {before['psnr']:.2f} dB before the adversarial phase"
        worse = now["perceptual"] > good["perceptual"] * (1 + _NOISE_PERCEPTUAL)
        if worse and now["psnr"] < good["psnr"] - _NOISE_DB:
            return (
                f"PSNR fell to {now['psnr']:.2f} dB and the perceptual distance rose to {now['perceptual']:.4g} "
                f"(from {good['psnr']:.2f} dB and {good['perceptual']:.4g})"
            )
        return None


def average_gradients(accelerator: Accelerator, module: nn.Module) -> None:
    """Replace the gradients of a module by their mean over the processes, in one message."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in module.parameters()]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))
