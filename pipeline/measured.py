"""The pictures that are measured: drawn with a model, or read from a folder; with how they came about."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from calotype import device
from calotype.data import Pictures, evenly_spaced
from calotype.errors import UserError
from calotype.folder import Entry, list_pictures
from calotype.images import draft_for, fit_image, load_image, to_uint8
from calotype.pipeline.given import given
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.randomness import uniform
from calotype.sheet import Sheet

_ON_CPU, _ON_ACCELERATOR = 512, 2000  # pictures drawn if nothing is said


class Samples(NamedTuple):
    """Pictures uint8 (n, C, H, W), their class ids (n,) or None, and how they came about."""

    x: Tensor
    labels: Tensor | None
    contract: str

    def batches(self, size: int = 64) -> tuple[Tensor, ...]:
        """The pictures in parts."""
        return self.x.split(size)


def default_count() -> int:
    """Pictures drawn if nothing is said: a matter of half a minute for a small model."""
    return _ON_CPU if device.device().type == "cpu" else _ON_ACCELERATOR


def draw(pipe: LatentDiffusionPipeline, settings, splits: dict[str, Pictures]) -> Samples:
    """Draw with classes, captions or given pictures as the pictures of the run have them."""
    n = default_count() if settings.n is None else settings.n
    told, labels = _told(pipe, splits, n, settings.seed)
    order = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance, "output_type": "pt"}
    if settings.sampler:
        order["sampler"] = settings.sampler
    parts = []
    with _counted(pipe) as evaluations:
        for start in track(range(0, n, settings.batch_size), "Drawing", transient=True):
            here = {name: values[start : start + settings.batch_size] for name, values in told.items()}
            parts.append(_batch(pipe, min(settings.batch_size, n - start), settings, start, order | here))
    return Samples(torch.cat(parts), labels, _contract(pipe, settings, n, evaluations[0] / n))


def _batch(pipe: LatentDiffusionPipeline, count: int, settings, start: int, order: dict) -> Tensor:
    """Pictures uint8 (B, C, H, W), rounded as they would be in a file."""
    try:
        with device.autocast(settings.precision):
            x = pipe(num_images=count, seed=settings.seed + start, **order).images
    except ValueError as error:  # the pipeline travels alone and knows no UserError
        raise UserError(str(error)) from None
    return (x.float() * 255).round().to(torch.uint8).cpu()


def _told(
    pipe: LatentDiffusionPipeline, splits: dict[str, Pictures], n: int, seed: int
) -> tuple[dict[str, list], Tensor | None]:
    """What each drawing is told, and the class ids (n,) it should then show.

    Classes come at random with their shares in the training pictures, prompts and given pictures from held-out ones.
    With equal shares, or evenly spread, samples would not be independent, and the kernel distance of a perfect model
    would not be 0.
    """
    if pipe.condition == "none":
        return {}, None
    pictures = splits["train" if pipe.condition == "class" else "val"]
    items = (uniform(seed, "evaluation/told", 0, n) * len(pictures)).long().tolist()
    labels = pictures.labels[items]
    if pipe.condition == "class":
        return {"label": [pipe.labels[label] for label in labels]}, labels
    known = labels if bool((labels >= 0).all()) else None
    if pipe.takes_image:
        return given(pipe, pictures, items)[0], known
    return {"label": [pictures.records[i].text for i in items]}, known


@contextmanager
def _counted(pipe: LatentDiffusionPipeline) -> Iterator[list[int]]:
    """Counts for how many pictures a network of the pipeline is evaluated, guidance and all."""
    total = [0]

    def count(_, args) -> None:
        total[0] += len(args[0])

    networks = filter(None, (pipe.unet, getattr(pipe, "guide", None)))
    hooks = [network.register_forward_pre_hook(count) for network in networks]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()


def _contract(pipe: LatentDiffusionPipeline, settings, n: int, evaluations: float) -> str:
    sampler = settings.sampler or getattr(pipe.config, "sampler", None) or type(pipe.scheduler).__name__
    guidance = pipe.default_guidance if settings.guidance is None else settings.guidance
    precision = str(device.resolve_precision(settings.precision)).removeprefix("torch.")
    return (
        f"{n:,} samples, averaged weights, {sampler}, {settings.steps or pipe.default_steps} steps, {evaluations:.3g} "
        f"network evaluations a picture, guidance {guidance:g}, seeds from {settings.seed}, {precision}"
    )


def read(folder: Path, sheet: Sheet, most: int | None) -> Samples:
    """Pictures drawn elsewhere, prepared as the sheet says; sub-folders with the names of classes are labels."""
    entries = _entries(folder)
    entries = [entries[i] for i in evenly_spaced(len(entries), most or len(entries))]
    parts = [_picture(folder / entry.file, sheet) for entry in track(entries, "Reading samples", transient=True)]
    return Samples(torch.stack(parts), _labels(entries, sheet), f"{len(parts):,} samples of {folder}")


def _entries(folder: Path) -> list[Entry]:
    try:
        return list_pictures(folder)
    except UserError as error:
        raise UserError(str(error).replace("SOURCE", "--samples", 1)) from None


def _picture(file: Path, sheet: Sheet) -> Tensor:
    size = tuple(sheet.image_size)
    return to_uint8(fit_image(load_image(file, channels=sheet.channels, draft_size=draft_for(size)), size, sheet.fit))


def _labels(entries: list[Entry], sheet: Sheet) -> Tensor | None:
    """Class ids (n,) by the names of sub-folders, None where there are none or strange ones."""
    safe = {name.replace("/", "_").replace("\\", "_").lstrip("."): i for i, name in enumerate(sheet.class_names)}
    numbers = {name: i for i, name in enumerate(sheet.class_names)} | safe
    if any(entry.label not in numbers for entry in entries):
        return None
    return torch.tensor([numbers[entry.label] for entry in entries])
