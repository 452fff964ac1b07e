"""`calotype generate`: draw pictures with a model folder and write PNGs that carry their settings."""

from pathlib import Path

from diffusers.utils import logging
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.progress import track

from calotype import __version__, device
from calotype.checkpoint import weights_hash
from calotype.errors import UserError
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline


def main(settings) -> None:
    """Draw n pictures; with classes and no label they take turns and go into a folder each."""
    pipe = load(settings.model)
    if settings.label is not None and settings.label not in pipe.labels:
        known = f"it knows {', '.join(pipe.labels[:60])}" if pipe.labels else "it was trained without labels"
        raise UserError(f"LABEL {settings.label!r} is not known to {settings.model}; {known}.")
    model = weights_hash(find(settings.model) / "unet")[:16]
    for start in track(range(0, settings.n, settings.batch_size), "Drawing", transient=True):
        count = min(settings.batch_size, settings.n - start)
        labels = [_label(pipe, settings.label, start + i) for i in range(count)]
        for i, image in enumerate(draw(pipe, labels, settings.seed + start, settings)):
            facts = {
                "label": labels[i] or "",
                "seed": settings.seed + start + i,
                "steps": settings.steps or pipe.default_steps,
                "guidance": pipe.default_guidance if settings.guidance is None else settings.guidance,
                "model": model,
                "software": f"calotype {__version__}",
            }
            write_png(image, _file(settings, labels[i], start + i), facts)
    print(f"{settings.n} pictures in {settings.out}")


def find(model: Path) -> Path:
    """The model folder that `model` names: itself, or RUN/pipeline; raises UserError."""
    for folder in (model, model / "pipeline"):
        if (folder / "model_index.json").is_file():
            return folder
    raise UserError(f"MODEL {model} holds no model; give a model folder or a run that reached `calotype export`.")


def load(model: Path) -> LatentDiffusionPipeline:
    """A saved pipeline on the best device here, ready to draw."""
    logging.disable_progress_bar()
    pipe = LatentDiffusionPipeline.from_pretrained(find(model), use_safetensors=True, local_files_only=True)
    for part in (pipe.unet, pipe.vae):
        device.choose_attention(part)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device.device())


def draw(pipe: LatentDiffusionPipeline, labels: list[str | None], seed: int, settings) -> list[Image.Image]:
    """One batch of pictures; the first is drawn with `seed`."""
    try:
        with device.autocast(settings.precision):
            return pipe(
                labels if pipe.labels else None,
                len(labels),
                seed=seed,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
            ).images
    except ValueError as error:  # the pipeline travels alone and knows no UserError
        raise UserError(str(error)) from None


def write_png(image: Image.Image, file: Path, facts: dict) -> None:
    """Write a PNG that carries how it was made as text; another's picture is never overwritten."""
    if file.exists() and "calotype:model" not in Image.open(file).info:
        raise UserError(f"--out: {file} is there already and not drawn by calotype; give another folder.")
    info = PngInfo()
    for name, value in facts.items():
        info.add_itxt(f"calotype:{name}", str(value))
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, pnginfo=info)


def _label(pipe: LatentDiffusionPipeline, label: str | None, i: int) -> str | None:
    """The wanted label, or every class in turn."""
    return label if label is not None or not pipe.labels else pipe.labels[i % len(pipe.labels)]


def _file(settings, label: str | None, i: int) -> Path:
    safe = (label or "").replace("/", "_").replace("\\", "_").lstrip(".")
    folder = settings.out / safe if settings.label is None and safe else settings.out
    return folder / f"{settings.seed + i:08d}.png"
