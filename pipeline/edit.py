"""`calotype edit`: pictures drawn again from part of the way, repainted in part, or moved by a difference of codes."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from rich.progress import track

from calotype.errors import UserError
from calotype.pipeline import latent_space
from calotype.pipeline.facts import about
from calotype.pipeline.generate import Job, draw, facts_of, files_of, find, for_users, given_facts, load, picture
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.png import write_png


def main(settings) -> None:
    """Change each picture n times; the results keep its name."""
    pipe = load(settings.model, settings.precision, compiled=settings.compile)
    files = files_of(settings.image)
    results = _moved(pipe, settings, files) if settings.plus else _redrawn(pipe, settings, files)
    count = 0
    for file, image, facts in results:
        write_png(image, file, facts)
        count += 1
    print(f"{count} pictures in {settings.out}")


def _redrawn(pipe: LatentDiffusionPipeline, settings, files: list[Path]) -> Iterator[tuple[Path, Image.Image, dict]]:
    """Files to write, pictures and their facts, drawn again."""
    more = {} if settings.mask is None else {"mask": picture(settings.mask, "--mask", 1, pipe.image_size)}
    if settings.strength is not None:
        more["strength"] = settings.strength
    facts = facts_of(pipe, settings) | given_facts(settings)
    facts |= {"strength": settings.strength} if settings.strength is not None else {}
    jobs = _jobs(pipe, settings, files)
    for start in track(range(0, len(jobs), settings.batch_size), "Drawing", transient=True):
        batch = jobs[start : start + settings.batch_size]
        for job, image in zip(batch, draw(pipe, batch, settings, **more), strict=True):
            yield job.file, image, {"label": job.label or "", "seed": job.seed} | facts


def _jobs(pipe: LatentDiffusionPipeline, settings, files: list[Path]) -> list[Job]:
    n, jobs = settings.n or 1, []
    for file in files:
        image = picture(file, "--image", pipe.image_channels, pipe.given_size)
        for _ in range(n):
            seed = settings.seed + len(jobs)
            name = f"{file.stem}.png" if n == 1 else f"{file.stem}-{seed:08d}.png"
            jobs.append(Job(seed, settings.out / name, settings.label, image))
    return jobs


def _moved(pipe: LatentDiffusionPipeline, settings, files: list[Path]) -> Iterator[tuple[Path, Image.Image, dict]]:
    """Files to write, pictures whose codes have moved, and their facts."""
    facts = {"amount": settings.amount} | about(find(settings.model))
    with for_users(settings.precision):
        plus, minus = (
            latent_space.mean_code(pipe, _batches(pipe, folder, flag, settings.batch_size))
            for folder, flag in ((settings.plus, "--plus"), (settings.minus, "--minus"))
        )
        for start in range(0, len(files), settings.batch_size):
            batch = files[start : start + settings.batch_size]
            images = [picture(file, "--image", pipe.image_channels, pipe.image_size) for file in batch]
            images = latent_space.moved(pipe, images, settings.amount * (plus - minus))
            yield from ((settings.out / f"{file.stem}.png", image, facts) for file, image in zip(batch, images))


def _batches(pipe: LatentDiffusionPipeline, folder: Path, flag: str, size: int) -> Iterator[list[Image.Image]]:
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is not a folder; give one with pictures.")
    files = files_of(folder, flag)
    for start in range(0, len(files), size):
        yield [picture(file, flag, pipe.image_channels, pipe.image_size) for file in files[start : start + size]]
