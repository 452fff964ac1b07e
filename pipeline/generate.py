"""`calotype generate`: draw pictures with a model folder and write PNGs that carry their settings."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from rich.progress import track

from calotype import device
from calotype.config import height_width
from calotype.errors import UserError
from calotype.images import fit_image, load_image
from calotype.pipeline import facts
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.model_folder import find, load
from calotype.pipeline.order import Order
from calotype.pipeline.png import write_png

# How an argument of the pipeline is called on the command line.
FLAGS = {
    "label": "LABEL",
    "num_images": "-n",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "height": "--size, height",
    "width": "--size, width",
} | {
    name: f"--{name.replace('_', '-')}"
    for name in ("seed", "guidance_interval", "guidance_rescale", "sampler", "fast", "image", "mask", "strength")
}


class Job(NamedTuple):
    """One picture to draw: its seed, its file, a class name or prompt, and the picture to begin with."""

    seed: int
    file: Path
    label: str | None
    image: Image.Image | None


def main(settings) -> None:
    """Draw n pictures; with classes and no label they take turns and go into a folder each."""
    pipe = load(settings.model, settings.precision, compiled=settings.compile)
    _refuse_wrong_words(pipe, settings)
    more = {"reproducible": settings.reproducible} | size_of(settings)
    if settings.mask is not None:
        more["mask"] = picture(settings.mask, "--mask", 1, pipe.image_size)
    jobs = _jobs(pipe, settings)
    carried = facts_of(pipe, settings, **more) | given_facts(settings)
    for start in track(range(0, len(jobs), settings.batch_size), "Drawing", transient=True):
        batch = jobs[start : start + settings.batch_size]
        for job, image in zip(batch, draw(pipe, batch, settings, **more), strict=True):
            write_png(image, job.file, {"label": job.label or "", "seed": job.seed} | carried)
    print(f"{len(jobs)} pictures in {settings.out}")


def size_of(settings) -> dict[str, int]:
    """What --size says to the pipeline."""
    return {} if settings.size is None else dict(zip(("height", "width"), height_width(settings.size), strict=True))


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
        raise UserError(translated(str(error), FLAGS)) from None


def translated(message: str, names: Mapping[str, str]) -> str:
    """What the pipeline says about an argument, with the name that a user knows it by."""
    message = re.sub(r"\bfast=True\b", names["fast"], message)
    return re.sub(r"^(\w+)(=?)", lambda found: _named(names, found[1], found[2]), message)


def _named(names: Mapping[str, str], name: str, equals: str) -> str:
    return f"{names[name]}{' ' if equals else ''}" if name in names else name + equals


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
        _refuse_late_seeds(settings, n)
        labels = [_label(pipe, settings.label, i) for i in range(n)]
        return [Job(settings.seed + i, file_of(settings, labels[i], i), labels[i], None) for i in range(n)]
    n, jobs, files = settings.n or 1, [], files_of(settings.image)
    _refuse_late_seeds(settings, n * len(files))
    for file in files:
        image = picture(file, "--image", pipe.image_channels, pipe.given_size)
        for _ in range(n):
            seed = settings.seed + len(jobs)
            name = f"{file.stem}.png" if n == 1 else f"{file.stem}-{seed:08d}.png"
            jobs.append(Job(seed, settings.out / name, _label(pipe, settings.label, len(jobs)), image))
    return jobs


def _refuse_late_seeds(settings, count: int) -> None:
    last = 2**63 - count
    if settings.seed > last:
        raise UserError(f"--seed {settings.seed} leaves no room for {count} pictures; give one from 0 to {last}.")


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
        raise UserError(f"{flag} {str(error).rstrip('.')}; give another picture.") from None


def facts_of(pipe: LatentDiffusionPipeline, settings, **more) -> dict[str, str]:
    """What every picture carries beside its label and seed; `more` is what the pipeline is told beside the flags."""
    order = Order(**order_of(settings), **more)
    precision = "bf16" if device.resolve_precision(settings.precision) == torch.bfloat16 else "fp32"
    about = facts.about(find(settings.model), "student" if settings.fast else "unet")
    return facts.drawn(pipe, order, precision) | about


def given_facts(settings) -> dict[str, str]:
    """That a picture was made from others, which it does not hold."""
    given = [name for name in ("image", "mask") if getattr(settings, name) is not None]
    return {"given": " and ".join(given)} if given else {}


def _label(pipe: LatentDiffusionPipeline, label: str | None, i: int) -> str | None:
    """The wanted label or prompt, or every class in turn."""
    return label if label is not None or not pipe.labels else pipe.labels[i % len(pipe.labels)]


def file_of(settings, label: str | None, i: int) -> Path:
    """The file of picture i; where labels take turns in a folder named after its own."""
    safe = (label or "").replace("/", "_").replace("\\", "_").lstrip(".")
    folder = settings.out / safe if settings.label is None and safe else settings.out
    return folder / f"{settings.seed + i:08d}.png"
