"""`calotype evaluate`: figures of a run on pictures that no stage has seen."""

import json
from pathlib import Path

import torch

from calotype import device
from calotype.autoencoder import decode, posterior
from calotype.checkpoint import write_text
from calotype.data import Pictures
from calotype.errors import UserError
from calotype.images import normalize
from calotype.metrics import psnr
from calotype.pipeline import measured, memorization, sample_figures
from calotype.pipeline.export import model_card
from calotype.pipeline.generate import find, load
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.sheet import read_sheet


def main(settings) -> None:
    """Write RUN/metrics.json; every figure names its split, its n and how it was made."""
    sheet = read_sheet(settings.run / "data.json")
    splits = {split: Pictures(sheet, split) for split in ("val", "train")}
    pipe = load(settings.run)
    metrics = reconstruction(pipe, splits["val"], settings.precision)
    if made := _samples(settings, pipe, splits):
        metrics |= sample_figures.figures(settings, pipe, splits[settings.reference], made)
        if settings.audit:
            metrics |= memorization.audit(settings.run / "evaluation", splits, made)
    metrics |= diffusion_loss(settings.run)
    write_text(settings.run / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False))
    write_text(find(settings.run) / "README.md", model_card(pipe, settings.run))
    for contract in dict.fromkeys(entry["contract"] for entry in metrics.values() if "contract" in entry):
        print(f"Measured: {contract}.")
    for name, entry in metrics.items():
        print(line(name, entry))


def line(name: str, entry: dict) -> str:
    """A figure as one line of text, without its contract."""
    between = f" ({entry['low']:.4g} to {entry['high']:.4g})" if "low" in entry else ""
    return f"{name} {entry['value']:.4g}{between}  (n = {entry['n']:,}; {entry['how']})"


def _samples(settings, pipe: LatentDiffusionPipeline, splits: dict[str, Pictures]) -> measured.Samples | None:
    """The pictures to measure, None if none are wanted or too few could be compared."""
    reference = splits[settings.reference]
    if settings.n == 0:
        return None
    if len(reference) < sample_figures.LEAST:
        print(
            f"Figures of samples are left out: {len(reference)} pictures in {settings.reference} are fewer than "
            f"{sample_figures.LEAST}; hold out more with --val."
        )
        return None
    if settings.n is not None and settings.n < sample_figures.LEAST:
        raise UserError(f"-n {settings.n} is too few to be measured; give {sample_figures.LEAST} or more, or 0.")
    if settings.samples:
        return measured.read(settings.samples, reference.sheet, settings.n)
    return measured.draw(pipe, settings, splits)


@torch.no_grad()
def reconstruction(pipe: LatentDiffusionPipeline, pictures: Pictures, precision: str) -> dict:
    """PSNR of every held-out picture through encoder and decoder, and how normal their latents are."""
    values, moments = [], []
    for start in range(0, len(pictures), 64):
        numbers = range(start, min(start + 64, len(pictures)))
        x = normalize(torch.stack([pictures[i] for i in numbers]).to(pipe.device))
        with device.autocast(precision):
            z = posterior(pipe.vae, x)["mean"]
            x_hat = decode(pipe.vae, z, tuple(x.shape[2:])).clamp(-1, 1)
        values.append(psnr(x_hat, x))
        moments.append(z.float())
    z = torch.cat(moments)
    n = len(pictures)
    how = f"mean over held-out pictures, the posterior's mean decoded, {device.resolve_precision(precision)}"
    return {
        "psnr[val]": {"value": torch.cat(values).mean().item(), "n": n, "how": how},
        "latent_std[val]": {"value": z.std().item(), "n": n, "how": "standard deviation of the posteriors' means"},
    }


def diffusion_loss(run: Path) -> dict:
    """The loss of the averaged weights on held-out latents, as the last validation found it."""
    file = run / "stage2_diffusion" / "finished.json"
    finished = json.loads(file.read_text()) if file.is_file() else {}
    if "loss[val]" not in finished:
        return {}
    how = f"averaged weights after {finished['steps']} steps, fixed noise and times"
    n = min(512, read_sheet(run / "data.json").counts["val"])
    return {"diffusion_loss[val]": {"value": finished["loss[val]"], "n": n, "how": how}}
