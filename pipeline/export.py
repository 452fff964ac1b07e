"""`calotype export`: the parts of a run in one folder that diffusers loads, with a model card and a sample sheet."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel

from calotype import __version__, device
from calotype.autoencoder import load_autoencoder
from calotype.checkpoint import publish, weights_hash
from calotype.errors import UserError
from calotype.images import image_grid
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline

_SHEET = 48


def main(settings) -> None:
    """Assemble RUN/stage1_vae/vae, RUN/stage2_diffusion/unet and its scheduler into the model folder."""
    run, out = settings.run, (settings.out or settings.run / "pipeline").resolve()
    _refuse_to_replace(out)
    pipe = assemble(run)
    temporary = out.parent / f".{out.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.save_pretrained(temporary, safe_serialization=True)
    sample_sheet(pipe.to(device.device()), settings.seed).save(temporary / "samples.png")
    (temporary / "README.md").write_text(model_card(pipe, run), encoding="utf-8")
    publish(temporary, out)
    print(f"Model: {out}")


def _refuse_to_replace(out: Path) -> None:
    """Only an older model, or nothing at all, may make way for a new one."""
    if out.exists() and not ((out / "model_index.json").is_file() or (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"--out {out} exists and is no model folder; give another.")


def assemble(run: Path) -> LatentDiffusionPipeline:
    """The pipeline of a run's finished stages; raises UserError where a part is missing or does not belong."""
    vae_folder, stage2 = run / "stage1_vae" / "vae", run / "stage2_diffusion"
    needed = {vae_folder / "config.json": "train-vae", stage2 / "finished.json": "train-diffusion"}
    for file, command in needed.items():
        if not file.is_file():
            raise UserError(f"--run {run}: {file} is not there; finish `calotype {command}` first.")
    facts = json.loads((stage2 / "model.json").read_text())
    if facts["vae"] != weights_hash(vae_folder):
        raise UserError(f"--run {run}: the diffusion model was trained for another autoencoder than {vae_folder}.")
    vae = load_autoencoder(vae_folder, "--run")
    unet = UNet2DModel.from_pretrained(stage2 / "unet", use_safetensors=True)
    for part in (vae, unet):
        part.register_to_config(_name_or_path="")  # diffusers would publish where on this machine they lay
    return LatentDiffusionPipeline(
        vae=vae,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler.from_pretrained(stage2 / "scheduler"),
        **{name: facts[name] for name in ("id2label", "default_steps", "default_guidance")},
    )


def sample_sheet(pipe: LatentDiffusionPipeline, seed: int):
    """A sheet of samples: every class while there is room (at most 48), or 48 pictures without classes."""
    names = pipe.labels[:_SHEET]
    columns = _columns(len(names)) if names else 8
    rows = max(1, _SHEET // columns) if len(names) <= columns else -(-len(names) // columns)
    labels = [names[i % len(names)] for i in range(rows * columns)] if names else None
    device.choose_attention(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    x = pipe(labels, rows * columns, seed=seed, output_type="pt").images
    return image_grid((x * 255).round().to(torch.uint8).cpu(), columns, labels)


def model_card(pipe: LatentDiffusionPipeline, run: Path) -> str:
    """The README.md of a model folder."""
    facts = _read(run / "data.json")
    height, width = pipe.image_size
    counts = facts.get("counts", {})
    label = repr(pipe.labels[0]) + ", " if pipe.labels else ""
    pixels = "grey" if pipe.image_channels == 1 else "colour"
    sentences = [
        f"A latent diffusion model of {height}x{width} {pixels} pictures, "
        f"with latents of shape {'x'.join(map(str, pipe.latent_shape))}.",
        f"Trained on {counts['train']:,} pictures; {counts['val']:,} were held out." if counts else "",
        f"Classes: {', '.join(pipe.labels[:60])}{' …' if len(pipe.labels) > 60 else ''}." if pipe.labels else "",
        f"By default a picture takes {pipe.default_steps} steps at guidance {pipe.default_guidance}"
        + (" (each evaluates the network with and without the label)." if pipe.default_guidance != 1 else "."),
    ]
    metrics = [
        f"| {name} | {entry['value']:.4g} | {entry['n']} |" for name, entry in _read(run / "metrics.json").items()
    ]
    table = ["| figure | value | n |", "|---|---|---|", *metrics] if metrics else []
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            "pipeline_tag: unconditional-image-generation",
            "tags: [latent-diffusion, calotype]",
            "---",
            "# A latent diffusion model of one's own",
            "",
            "![samples](samples.png)",
            "",
            *filter(None, sentences),
            "",
            *table,
            "",
            "```python",
            "from diffusers import DiffusionPipeline",
            'pipe = DiffusionPipeline.from_pretrained("PATH_OF_THIS_FOLDER", trust_remote_code=True)',
            f"pipe({label}num_images=4, seed=0).images",
            "```",
            "",
            f"Made with calotype {__version__}.",
            "",
        ]
    )


def _columns(count: int) -> int:
    """Columns of a sheet: 48 classes stand as 8 colours below 6 shapes, ten as ten columns."""
    return next((n for n in (6, 8, 10, 12) if count % n == 0 and count > 12), min(count, 12))


def _read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.is_file() else {}
