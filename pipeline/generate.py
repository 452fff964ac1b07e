"""`calotype generate`: draw pictures with a model folder and write PNGs that carry their settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.utils import logging
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.progress import track

from calotype import __version__, device
from calotype.checkpoint import weights_hash
from calotype.config import height_width
from calotype.errors import UserError
from calotype.images import fit_image, load_image
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline

_NETWORKS = ("vae", "unet", "guide", "student", "tiny_decoder")


class Job(NamedTuple):
    """One picture to draw: its seed, its file, a class name or prompt, and the picture to begin with."""

    seed: int
    file: Path
    label: str | None
    image: Image.Image | None


def main(settings) -> None:
    """Draw n pictures; with classes and no label they take turns and go into a folder each."""
    pipe = load(settings.model)
    _refuse_wrong_words(pipe, settings)
    jobs = _jobs(pipe, settings)
    more = {} if settings.mask is None else {"mask": picture(settings.mask, "--mask", 1, pipe.image_size)}
    if settings.size is not None:
        more |= dict(zip(("height", "width"), height_width(settings.size), strict=True))
    facts = facts_of(pipe, settings)
    for start in track(range(0, len(jobs), settings.batch_size), "Drawing", transient=True):
        batch = jobs[start : start + settings.batch_size]
        for job, image in zip(batch, draw(pipe, batch, settings, **more), strict=True):
            write_png(image, job.file, {"label": job.label or "", "seed": job.seed} | facts)
    print(f"{len(jobs)} pictures in {settings.out}")


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
    for name in _NETWORKS:
        if getattr(pipe, name) is not None:
            device.choose_attention(getattr(pipe, name))
    if pipe.tiny_decoder is not None:
        pipe.tiny_decoder.to(memory_format=torch.channels_last)  # a third less time on a CPU
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device.device())


def draw(pipe: LatentDiffusionPipeline, jobs: list[Job], settings, **more) -> list[Image.Image]:
    """One batch of pictures, whose seeds follow each other; raises UserError."""
    pictures = {} if jobs[0].image is None else {"image": [job.image for job in jobs]}
    labels = None if all(job.label is None for job in jobs) else [job.label for job in jobs]
    with for_users(settings.precision):
        return pipe(labels, len(jobs), seed=jobs[0].seed, **order_of(settings), **pictures, **more).images


@contextmanager
def for_users(precision: str) -> Iterator[None]:
    """In this precision, with the pipeline's errors as UserError: it travels alone and knows none."""
    try:
        with device.autocast(precision):
            yield
    except ValueError as error:
        raise UserError(str(error)) from None


def order_of(settings) -> dict:
    """What the flags that all drawing commands share say to the pipeline."""
    return {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "guidance_interval": settings.guidance_interval,
        "guidance_rescale": settings.guidance_rescale,
        "sampler": settings.sampler,
        "fast": settings.fast,
    }


def write_png(image: Image.Image, file: Path, facts: dict) -> None:
    """Write a PNG that carries how it was made as text; another's picture is never overwritten."""
    if file.exists() and "calotype:model" not in Image.open(file).info:
        raise UserError(f"--out: {file} is there already and not drawn by calotype; give another folder.")
    info = PngInfo()
    for name, value in facts.items():
        info.add_itxt(f"calotype:{name}", str(value))
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, pnginfo=info)


def _refuse_wrong_words(pipe: LatentDiffusionPipeline, settings) -> None:
    """Whether a label, prompt, picture and mask were given where the model takes one, and not where it does not."""
    label = settings.label
    if pipe.condition == "text":
        if label is None:
            raise UserError(f"LABEL: {settings.model} draws from text; give a prompt.")
    elif label is not None and label not in pipe.labels:
        known = f"it knows {', '.join(pipe.labels[:60])}" if pipe.labels else "it was trained without labels"
        raise UserError(f"LABEL {label!r} is not known to {settings.model}; {known}.")
    for flag, given, wanted in (
        ("--image", settings.image, pipe.takes_image),
        ("--mask", settings.mask, pipe.condition == "inpaint"),
    ):
        if (given is not None) != wanted:
            way = f"give {flag} too" if wanted else f"leave {flag} out, or change pictures with `calotype edit`"
            raise UserError(f"{flag} {given}: {settings.model} has the condition {pipe.condition}; {way}.")


def _jobs(pipe: LatentDiffusionPipeline, settings) -> list[Job]:
    """What is to be drawn, in the order of the seeds; n times each given picture, or n pictures in all."""
    if settings.image is None:
        n = 16 if settings.n is None else settings.n
        labels = [_label(pipe, settings.label, i) for i in range(n)]
        return [Job(settings.seed + i, _file(settings, labels[i], i), labels[i], None) for i in range(n)]
    n, jobs = settings.n or 1, []
    for file in files_of(settings.image):
        image = picture(file, "--image", pipe.image_channels, pipe.given_size)
        for _ in range(n):
            seed = settings.seed + len(jobs)
            name = f"{file.stem}.png" if n == 1 else f"{file.stem}-{seed:08d}.png"
            jobs.append(Job(seed, settings.out / name, _label(pipe, settings.label, len(jobs)), image))
    return jobs


def files_of(path: Path, flag: str = "--image") -> list[Path]:
    """A picture, or all of a folder by name."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise UserError(f"{flag} {path} is an empty folder; give a picture or a folder of pictures.")
    return files


def picture(file: Path, flag: str, channels: int, size: tuple[int, int]) -> Image.Image:
    """The picture in a file, cropped to a size (height, width); raises UserError that begins with the flag."""
    try:
        return fit_image(load_image(file, channels=channels), size, "crop")
    except UserError as error:
        raise UserError(f"{flag} {error}") from None


def facts_of(pipe: LatentDiffusionPipeline, settings) -> dict:
    """What every picture carries beside its label and seed."""
    facts = {
        "steps": settings.steps or (pipe.config.student_steps if settings.fast else pipe.default_steps),
        "guidance": pipe.default_guidance if settings.guidance is None else settings.guidance,
        "sampler": settings.sampler or pipe.config.sampler or type(pipe.scheduler).__name__,
    }
    if settings.fast:
        facts |= {"guidance": "built in", "sampler": type(pipe.student_scheduler).__name__}
    return facts | about(settings.model, "student" if settings.fast else "unet")


def about(model: Path, network: str = "unet") -> dict:
    """What a picture carries of where it comes from."""
    return {"model": weights_hash(find(model) / network)[:16], "software": f"calotype {__version__}"}


def _label(pipe: LatentDiffusionPipeline, label: str | None, i: int) -> str | None:
    """The wanted label or prompt, or every class in turn."""
    return label if label is not None or not pipe.labels else pipe.labels[i % len(pipe.labels)]


def _file(settings, label: str | None, i: int) -> Path:
    safe = (label or "").replace("/", "_").replace("\\", "_").lstrip(".")
    folder = settings.out / safe if settings.label is None and safe else settings.out
    return folder / f"{settings.seed + i:08d}.png"
