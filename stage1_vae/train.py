"""Stage 1: train an autoencoder on pictures. `calotype train-vae`, or `torchrun -m calotype.stage1_vae.train`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import VQModel
from PIL import Image
from torch import Tensor

from calotype import device, loop
from calotype.autoencoder import Facts, write_facts
from calotype.checkpoint import publish
from calotype.config import PRESET_IMAGE_SIZE
from calotype.data import Batch, PictureBatches, Pictures, evenly_spaced, micro_batches, share_of
from calotype.data_change import refuse_changed
from calotype.data_errors import DataErrors
from calotype.images import normalize
from calotype.randomness import normal
from calotype.ranks import refuse_differences
from calotype.sheet import Sheet, open_sheet, refuse_flip, summary
from calotype.stage import Review
from calotype.stage1_vae import folding, models, perceptual, start
from calotype.stage1_vae.adversary import Adversary
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.corruption import parse_corruption
from calotype.stage1_vae.diagnoses import Diagnoses
from calotype.stage1_vae.held_out import HeldOut
from calotype.stage1_vae.losses import RECONSTRUCTION
from calotype.stage1_vae.regularizers import KL, FiniteScalar, VectorQuantization
from calotype.stage1_vae.total_correlation import TotalCorrelation

_STATISTICS_PICTURES = 16_384  # enough for a relative error of the deviation well below 1 %
_START_PICTURES = 256
_PERCEPTUAL_WEIGHT = {"features": 3.0, "lpips": 1.0}
_WEAK_PULL = 1e-3  # on the latents of an autoencoder for diffusion, where no bound is asked for


class VaeStage:
    """Stage 1 as the loop sees it."""

    name = "train-vae"
    exports = ("vae",)

    def __init__(self, settings: VaeSettings, sheet: Sheet, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        self.share = share_of(accelerator, settings.batch_size, settings.micro_batches)
        self.pictures = Pictures(sheet, "train")
        size = tuple(sheet.image_size)
        self.model = models.build(settings, sheet.channels, size)
        if settings.init and not isinstance(self.model.vae, VQModel):
            folding.ensure_quant_convs(self.model.vae)
        device.for_training(self.model, self.model.vae.encoder, self.model.vae.decoder, compiled=settings.compile)
        self.latent_shape = models.latent_shape(self.model.vae, size)
        self.perceptual = perceptual.build(settings, size, accelerator.device)
        self.reconstruction = RECONSTRUCTION[settings.reconstruction or ("l1" if self.perceptual else "mse")]
        self.corrupt = parse_corruption(settings.corruption)
        self.values = sheet.channels * size[0] * size[1]
        self.batch_source = PictureBatches(self.pictures, seed=settings.seed, flip=settings.flip)
        if not settings.init:
            x = self.take(self.pictures, evenly_spaced(len(self.pictures), _START_PICTURES)).cpu()
            start.prepare(self.model, x, settings.seed)
        self.adversary = Adversary(settings, sheet.channels, size, accelerator) if settings.adversarial else None
        self.correlation = self._total_correlation()
        self.diagnoses = Diagnoses()
        self.models, self.averages = self._models(), {}
        self.identity = {"the data": sheet.fingerprint}
        optimizer = loop.make_optimizer(self.model, settings, settings.lr)
        self.wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.optimizers = {"vae": self.optimizer.optimizer} | self._critics("optimizer")
        self.held_out = HeldOut(self, Pictures(sheet, "val"))
        self.errors = DataErrors(self.pictures, accelerator)
        self.state: dict[str, dict[str, Any]] = {"diagnoses": self.diagnoses.state, "data": self.errors.state}
        if self.adversary:
            self.state["adversary"] = self.adversary.state

    def _total_correlation(self) -> TotalCorrelation | None:
        if self.settings.regularizer != "tc":
            return None
        return TotalCorrelation(self.settings, torch.Size(self.latent_shape).numel(), self.accelerator)

    def _models(self) -> dict[str, torch.nn.Module]:
        """Everything that is learnt and the codebook's averages, by the name it has in a checkpoint."""
        found: dict[str, torch.nn.Module] = {"vae": self.model.vae}
        if isinstance(self.model.regularizer, VectorQuantization):
            found["codebook"] = self.model.regularizer.average
        if isinstance(self.model.regularizer, FiniteScalar):
            found["whitening"] = self.model.regularizer.whitening
        if self.model.likelihood:
            found["likelihood"] = self.model.likelihood
        if self.adversary:
            found["discriminator"] = self.adversary.discriminator
        if self.correlation:
            found["critic"] = self.correlation.critic
        return found

    def _critics(self, attribute: str) -> dict[str, Any]:
        critics = {"discriminator": self.adversary, "critic": self.correlation}
        return {name: getattr(critic, attribute) for name, critic in critics.items() if critic}

    def batches(self, step: int) -> Iterator[Batch]:
        """Pictures of this process from `step` on."""
        return self.errors.watch(self.batch_source.from_step(step, self.share, self.settings.workers))

    # The step

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step on pictures (B, C, H, W)."""
        figures = self.backward(batch, step)
        phase = self.adversary.phase(step) if self.adversary else "waiting"
        if phase == "pretraining":
            return figures | {"gradient_norm": self.adversary.update()}
        norm = loop.update(self.accelerator, self.wrapped, self.optimizer, self.settings.clip).detach()
        self.model.regularizer.after_step(norm.isfinite())
        if phase == "playing":
            self.adversary.update()
        if self.correlation:
            figures |= self.correlation.update(step)
        return figures | {"gradient_norm": norm}

    def backward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The gradients of a step, and its figures as means over this process's pictures."""
        parts = self.settings.micro_batches
        figures = [
            self._backward(part, step)
            for part in micro_batches(self.accelerator, self.wrapped, batch.to(self.accelerator.device), parts)
        ]
        return {name: torch.stack([values[name] for values in figures]).mean() for name in figures[0]}

    def forget(self) -> None:
        """Clear the gradients and what the regulariser and the critic have seen."""
        self.optimizer.zero_grad(set_to_none=True)
        for optimizer in self._critics("optimizer").values():
            optimizer.zero_grad(set_to_none=True)
        for memory in (self.model.regularizer, self.correlation):
            getattr(memory, "seen", []).clear()

    def _backward(self, part: Batch, step: int) -> dict[str, Tensor]:
        """Gradients of one micro-batch; one walk through the autoencoder, whatever looks at its output."""
        parts = self.settings.micro_batches
        x, damaged, eps = self._inputs(part)
        phase = self.adversary.phase(step) if self.adversary else "waiting"
        if phase == "pretraining":
            with torch.no_grad():
                out = self.wrapped(damaged, eps)
            return self.adversary.pretrain(out.x_hat, x, step, parts)
        out = self.wrapped(damaged, eps)
        fidelity = {name: value.mean() for name, value in self.fidelity(out, x).items()}
        asked = {name: value.mean() for name, value in self.asked(out).items()}
        weights = self.weights(step)
        error = sum(weights[name] * value for name, value in fidelity.items())
        price = sum(weights[name] * value for name, value in asked.items())
        figures = {"loss": error + price} | fidelity | asked
        if phase == "playing":
            last = self.model.vae.decoder.conv_out.weight
            error, more = self.adversary.single_pass(out, x, error, last, step, parts)
            figures |= more
        self.accelerator.backward((error + price) / parts)
        return {name: torch.as_tensor(value).detach() for name, value in figures.items()}

    def _inputs(self, part: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The target, the encoder's input (B, C, H, W) and the posterior's noise (B, c, h, w)."""
        x = normalize(part.x)
        eps = normal(self.settings.seed, "posterior", part.start, len(x), self.latent_shape)
        damaged = self.corrupt(x, self.settings.seed, part.start, "train") if self.corrupt else x
        return x, damaged, eps.to(x.device, non_blocking=True)

    def fidelity(self, out: models.Reconstruction, x: Tensor) -> dict[str, Tensor]:
        """What compares x_hat with x, by name, (B,) each: an error or nats per value, and a perceptual distance."""
        if self.model.likelihood:
            terms = {"nats": self.model.likelihood(out.x_hat, x, out.log_scale) / self.values}
        else:
            terms = {"reconstruction": self.reconstruction(out.x_hat, x)}
        if self.perceptual:
            with torch.no_grad():
                target = self._features(x)
            terms["perceptual"] = self.perceptual.distance(self._features(out.x_hat), target)
        return terms

    def _features(self, x: Tensor) -> list[Tensor]:
        """Maps of pictures (B, C, H, W): from a network in the precision of the run, from fixed filters in fp32."""
        network = isinstance(self.perceptual, perceptual.Lpips)
        with device.autocast(self.settings.precision if network else "fp32"):
            return [maps.float() for maps in self.perceptual.features(x)]

    def asked(self, out: models.Reconstruction) -> dict[str, Tensor]:
        """What is asked of the latents, by name, (B,) each."""
        return out.terms | ({"tc": self.correlation.term(out.z)} if self.correlation else {})

    def weights(self, step: int) -> dict[str, float]:
        """The weight of each term of the loss.

        A term in nats counts over the number of values, so that beta means the same at any picture size. beta at step s
        is min(1, s / warm-up) * beta (Bowman et al. 2016).
        """
        settings = self.settings
        beta = (1.0 if settings.beta is None else settings.beta) if settings.bound else _WEAK_PULL
        warmup = min(1.0, step / settings.beta_warmup) if settings.beta_warmup else 1.0
        return {
            "nats": 1.0,
            "reconstruction": 1.0,
            "perceptual": settings.perceptual_weight or _PERCEPTUAL_WEIGHT.get(settings.perceptual, 1.0),
            "kl": warmup * beta / self.values,
            "tc": settings.gamma / self.values,
            "commitment": settings.commitment,
        }

    # What the loop asks for now and then

    def validate(self) -> dict[str, float]:
        """Figures over held-out pictures, shared out over the processes."""
        return self.held_out.figures() | self.errors.figures()

    def review(self, figures: dict[str, float], step: int, progress: float) -> Review:
        """Diagnoses, and what the guard of the adversarial phase says."""
        guard = self.adversary.review(figures, step, progress) if self.adversary else Review()
        if not (self.adversary and self.adversary.phase(step) == "playing"):
            figures = figures | {"discriminator_accuracy": 0.0}  # it is meant to win while it learns alone
        sentences = (*self.diagnoses.of(figures, progress), *guard.sentences, *self.errors.sentences())
        return guard._replace(sentences=sentences)

    def preview(self) -> Image.Image:
        """Held-out pictures above their reconstructions."""
        return self.held_out.sheet()

    def export(self, folder: Path) -> None:
        """Fold the latent statistics and write the autoencoder, and the facts a bound needs, as folder/vae."""
        vae = self.model.vae.eval()
        log_variance = getattr(self.model.regularizer, "fixed_log_variance", None)
        if log_variance is not None:
            folding.fix_variance(vae, log_variance)
        if isinstance(self.model.regularizer, FiniteScalar):
            self.model.regularizer.whitening.fold_into(vae.quant_conv)
        statistics = self._statistics()
        folding.fold(vae, statistics)
        temporary = folder / ".vae"
        vae.save_pretrained(temporary, safe_serialization=True)
        write_facts(temporary, self._facts(statistics))
        publish(temporary, folder / "vae")

    def _facts(self, statistics: folding.Statistics) -> Facts:
        if not (self.model.likelihood and isinstance(self.model.regularizer, KL)):
            return Facts()
        mean, std = statistics
        return Facts(
            likelihood=self.model.likelihood.kind,
            scale=self.model.likelihood.scale,
            prior_mean=(-mean / std).tolist(),
            prior_std=(1 / std).tolist(),
        )

    @torch.no_grad()
    def _statistics(self) -> folding.Statistics:
        """Statistics of the latents over the training pictures (at most 16,384 of them, spread evenly)."""
        running = folding.RunningStatistics()
        numbers = evenly_spaced(len(self.pictures), _STATISTICS_PICTURES)
        for i in range(0, len(numbers), 128):
            h = self.encode(self.take(self.pictures, numbers[i : i + 128]))
            if isinstance(self.model.vae, VQModel):
                running.add(self.model.regularizer.mode(h))
            else:
                mean, logvar = h.chunk(2, dim=1)
                running.add(mean, logvar.clamp(-30, 20).cpu().double().exp())
        return running.result()

    def encode(self, x: Tensor) -> Tensor:
        """What the regulariser takes, of pictures (B, C, H, W)."""
        with device.autocast(self.settings.precision):
            return self.model.encode(x)

    def decode(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        """x_hat (B, C, *size), clamped, of latents (B, c, h, w)."""
        with device.autocast(self.settings.precision):
            return self.model.decode(z, size).float().clamp(-1, 1)

    def take(self, pictures: Pictures, numbers: list[int]) -> Tensor:
        """Some pictures (B, C, H, W) in [-1, 1] on the device."""
        return normalize(torch.stack([pictures[i] for i in numbers]).to(self.accelerator.device))


def main(settings: VaeSettings) -> None:
    """`calotype train-vae`."""
    accelerator = device.accelerator(settings.precision, trackers=settings.trackers, folder=settings.out)
    sheet = open_sheet(settings.source, settings, settings.seed, settings.out, PRESET_IMAGE_SIZE[settings.preset])
    refuse_flip(settings.flip, sheet)
    refuse_changed(sheet, allowed=settings.allow_data_change, say=accelerator.print)
    refuse_differences(accelerator, settings, {"the data": sheet.fingerprint})
    accelerator.print(summary(sheet))
    stage = VaeStage(settings, sheet, accelerator)
    if accelerator.is_main_process:
        sheet.keep(Path(settings.source), settings.out)
    loop.fit(stage, settings, accelerator)


if __name__ == "__main__":
    from calotype.cli import main as cli

    device.leave(lambda: cli(["train-vae", *sys.argv[1:]]))
