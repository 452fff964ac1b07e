"""`calotype distill`: a student that draws in a few steps, and a tiny decoder, out of a finished run."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from calotype import device, loop
from calotype.autoencoder import load_autoencoder
from calotype.checkpoint import publish, weights_hash, write_text
from calotype.data import Batch, evenly_spaced, micro_batches, share_of
from calotype.ema import PowerEma
from calotype.errors import UserError
from calotype.latents import LatentBatches, LatentCache
from calotype.memory import backward_that_fits
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.randomness import normal, uniform
from calotype.sheet import Sheet, read_sheet
from calotype.stage import Review
from calotype.stage2_diffusion import conditioning
from calotype.stage2_diffusion.consistency import Consistency, SlowCopy, few_step_sampler, pseudo_huber
from calotype.stage2_diffusion.denoiser import Denoiser, Given
from calotype.stage2_diffusion.distill_config import DistillSettings
from calotype.stage2_diffusion.objectives import Objective
from calotype.stage2_diffusion.preview import sample_sheet
from calotype.stage2_diffusion.teacher import Teacher, trained_with
from calotype.stage2_diffusion.tiny_decoder import DecoderStage

_VALIDATION_LATENTS = 256
_ROWS = 64  # of a validation batch


class StudentStage:
    """The student's training as the loop sees it: a network that begins as the teacher and becomes consistent.

    The teacher's guidance is built in, so that a step is one evaluation.
    """

    name = "distill student"
    exports = ("student", "student_scheduler")

    def __init__(self, settings: DistillSettings, run: "FinishedRun", accelerator: Accelerator):
        self.settings, self.accelerator, self.run = settings, accelerator, run
        self.share = share_of(accelerator, settings.batch_size, settings.micro_batches)
        self.trained = trained_with(
            run.stage2,
            latents=run.latents,
            seed=settings.seed,
            precision=settings.precision,
            out=settings.out,
        )
        self.cache, self.held_out = LatentCache(run.latents, "train"), LatentCache(run.latents, "val")
        self.condition = conditioning.build(self.trained, self.cache, self.held_out, run.sheet, run.vae)
        self.teacher = Teacher(run.stage2, self.condition, settings.guidance)
        objective = Objective(self.trained)
        self.consistency, self.sampler = Consistency(objective, settings.teacher_steps), few_step_sampler(objective)
        self.identity = {"the teacher": self.teacher.hash, "the data": self.cache.index.fingerprint}
        self.net = self.teacher.network()
        self.teacher.net.to(accelerator.device)
        optimizer = loop.make_optimizer(self.net, settings, settings.lr)
        self.wrapped, self.optimizer = accelerator.prepare(self.net, optimizer)
        self.models, self.optimizers = {"student": self.net.unet}, {"student": self.optimizer.optimizer}
        self.ema = PowerEma(self.net.unet, settings.ema_width)
        self.slow = SlowCopy(self.net.unet)
        self.averages = {"student": self.ema, "target": self.slow}
        self.averaged, self.target = (
            Denoiser(average.model, self.condition.text_encoder) for average in self.averages.values()
        )
        self.state: dict[str, dict[str, Any]] = {"memory": {"parts": settings.micro_batches}}

    def batches(self, step: int) -> Iterator[Batch]:
        """Latents and labels of this process from `step` on."""
        return LatentBatches(self.cache, self.settings.seed).from_step(step, self.share)

    # The step

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step on latents (B, c, h, w)."""
        figures = backward_that_fits(self, batch, step)
        norm = loop.update(self.accelerator, self.wrapped, self.optimizer, self.settings.clip)
        self.ema.update(self.net.unet, step + 1, norm.isfinite())
        self.slow.update(self.net.unet)
        return figures | {"gradient_norm": norm.detach()}

    def backward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The gradients of a step, and its loss as a mean over this process's latents."""
        parts = self.state["memory"]["parts"]
        total = torch.zeros((), device=self.accelerator.device)
        for part in micro_batches(self.accelerator, self.wrapped, batch.to(self.accelerator.device), parts):
            given = self.condition.of(part, "train", self.trained.label_dropout)
            loss = self.errors(self.wrapped, part, given, "train").mean() / parts
            self.accelerator.backward(loss)
            total += loss.detach()
        return {"loss": total}

    def errors(self, net: torch.nn.Module, batch: Batch, given: Given, purpose: str) -> Tensor:
        """Losses (B,) between neighbours on the grid; noise and places follow from the positions."""
        seed, z, start = self.settings.seed, batch.x, batch.start
        eps = normal(seed, f"{purpose} noise", start, len(z), tuple(z.shape[1:])).to(z.device, non_blocking=True)
        i = (uniform(seed, f"{purpose} place", start, len(z)) * len(self.consistency)).long()
        y = self.consistency.point(z, eps, i)
        with device.autocast(self.settings.precision):
            target = self.consistency.target(self.target, self.teacher, y, i, given)
        return pseudo_huber(self.consistency.clean(net, y, i, given), target)

    def forget(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    # What the loop asks for now and then

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean error of the averaged student on held-out latents, at noise and segments that never change."""
        items = evenly_spaced(len(self.held_out), _VALIDATION_LATENTS)
        total = torch.zeros(2, device=self.accelerator.device)
        for start in range(self.share.rank * _ROWS, len(items), self.share.world * _ROWS):
            numbers = torch.tensor(items[start : start + _ROWS])
            z, label = (self.held_out.gather(numbers.numpy(), name) for name in ("mean", "label"))
            batch = Batch(z, label, start, numbers).to(self.accelerator.device)
            with device.autocast(self.settings.precision):
                errors = self.errors(self.averaged, batch, self.condition.of(batch, "val", 0.0), "validation")
            total += torch.stack([errors.sum(), errors.new_tensor(len(errors))])
        total = self.accelerator.reduce(total, "sum")
        return {"loss": (total[0] / total[1]).item()}

    def review(self, figures: dict[str, float], step: int, progress: float) -> Review:
        """Nothing to say."""
        return Review()

    @torch.no_grad()
    def preview(self) -> Image.Image:
        """Samples of the averaged student in its few steps."""
        return sample_sheet(self.pipeline(), self.condition, len(self.held_out), self.settings.precision)

    def pipeline(self) -> LatentDiffusionPipeline:
        """The averaged student as a model of its own."""
        pipe = LatentDiffusionPipeline(
            self.run.vae(),
            self.ema.model,
            self.sampler,
            text_encoder=self.condition.text_encoder,
            tokenizer=self.condition.tokenizer,
            id2label=self.teacher.facts["id2label"],
            condition=self.condition.kind,
            default_steps=self.settings.student_steps,
            default_guidance=1.0,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def export(self, folder: Path) -> None:
        """Write the averaged student and its scheduler."""
        for name, part in (("student", self.ema.model), ("student_scheduler", self.sampler)):
            part.save_pretrained(folder / f".{name}")
            publish(folder / f".{name}", folder / name)


class FinishedRun:
    """Where the parts of a finished run lie; raises UserError where one is missing or does not belong."""

    def __init__(self, settings: DistillSettings, where: torch.device):
        run, self.where = settings.run, where
        self.stage2 = run / "stage2_diffusion"
        self.latents = settings.latents or run / "latents"
        self.vae_folder = settings.vae or run / "stage1_vae" / "vae"
        self.data = settings.data or run / "data.json"
        self._vae = None
        trained_with(self.stage2, latents=self.latents, out=settings.folder)
        expected = LatentCache(self.latents, "train").index.vae
        if not (self.vae_folder / "config.json").is_file() or weights_hash(self.vae_folder) != expected:
            raise UserError(f"--vae {self.vae_folder} is not the autoencoder that made {self.latents}; name that one.")

    def vae(self):
        """The autoencoder, loaded when it is first needed."""
        if self._vae is None:
            self._vae = load_autoencoder(self.vae_folder, "--vae").to(self.where).requires_grad_(False)
            device.for_drawing(self._vae)
        return self._vae

    def sheet(self) -> Sheet:
        """The pictures that the latents were made of; raises UserError if they are others."""
        sheet = read_sheet(self.data)
        if sheet.fingerprint != LatentCache(self.latents, "train").index.fingerprint:
            raise UserError(f"--data {self.data} is not the sheet that {self.latents} was made of; name that one.")
        return sheet


def main(settings: DistillSettings) -> None:
    """`calotype distill`: the student, then the decoder; what is finished is left alone."""
    accelerator = device.accelerator(settings.precision, trackers=settings.trackers, folder=settings.folder)
    run = FinishedRun(settings, accelerator.device)
    end = accelerator.end_training
    accelerator.end_training = accelerator.wait_for_everyone  # it parts the processes, who have the decoder to train
    student = StudentStage(settings.of_student(), run, accelerator)
    loop.fit(student, student.settings, accelerator)
    accelerator.end_training = end
    decoder = DecoderStage(settings.of_decoder(), run, accelerator)
    loop.fit(decoder, decoder.settings, accelerator)
    if accelerator.is_main_process:
        _publish(settings, student, decoder)


def _publish(settings: DistillSettings, student: StudentStage, decoder: DecoderStage) -> None:
    """Bring the finished parts to where `calotype export` looks for them; distilled.json comes last."""
    folder = settings.folder
    for stage in (student, decoder):
        for name in stage.exports:
            shutil.rmtree(folder / f".{name}", ignore_errors=True)
            shutil.copytree(stage.settings.out / name, folder / f".{name}")
            publish(folder / f".{name}", folder / name)
    measured = json.loads((decoder.settings.out / "finished.json").read_text())
    facts = {
        "steps": settings.student_steps,
        "guidance": student.teacher.guidance,
        "teacher": student.teacher.hash,
        "decoder_psnr": measured["psnr[val]"],
        "decoder_psnr_gap": measured["psnr_gap[val]"],
    }
    write_text(folder / "distilled.json", json.dumps(facts, indent=1))
    print(
        f"Student ({facts['steps']} steps) and tiny decoder: {folder}\n"
        f"Next: calotype export --run {settings.run}, then calotype generate {settings.run} --fast --out samples"
    )


if __name__ == "__main__":
    from calotype.cli import main as cli

    device.leave(lambda: cli(["distill", *sys.argv[1:]]))
