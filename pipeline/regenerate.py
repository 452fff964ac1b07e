"""`calotype regenerate`: a picture drawn again from what its PNG carries, and compared with itself."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from calotype.errors import UserError
from calotype.pipeline import facts
from calotype.pipeline.generate import FLAGS, for_users, translated
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.model_folder import find, load
from calotype.pipeline.order import MOST, Order
from calotype.pipeline.png import read_facts, write_png
from calotype.pipeline.samplers import SAMPLERS
from calotype.weights import first_line

# Facts without which a picture cannot be drawn again.
_NEEDED = (
    "label", "seed", "steps", "guidance", "guidance-interval", "guidance-rescale", "sampler", "fast", "size",
    "precision", "reproducible", "model", "parts",
)  # fmt: skip
# Facts that tell that the picture depends on more than it carries, and what draws such a one again.
_MORE = {
    "given": "was made from a picture that it does not hold; give that to `calotype generate` or `calotype edit` again",
    "edit": "was made from a picture that it does not hold; drop that on the tab Edit, or give it to `calotype edit`",
    "amount": "is the sum of codes of pictures that it does not hold; give these to `calotype edit` again",
    "from": "lies on a way between two ends; draw that again with `calotype interpolate`",
    "walk": "lies on a way between two ends; draw that again with the tab Interpolate",
    "prior": "was drawn by a flow; draw it again with `calotype generate --prior flow` and its seed",
    "sheet": "is a sheet of many; give one of its pictures",
}
_WORST = 1  # of 255: what another batch, thread count or layout may change


def main(settings) -> int:
    """Write the new picture and say how far it is from the old one; 1 where they differ by more than rounding."""
    found, before = read_carried(settings.file), _pixels(settings.file)
    order = order_of(found, settings.file)
    model = settings.model or _nearby(settings.file, found)
    pipe = load(model)
    _refuse_other_model(find(model), found, settings)
    image = _drawn(pipe, found, order)
    out = settings.out or settings.file.with_name(f"{settings.file.stem}-again.png")
    _refuse_itself(out, settings.file)
    write_png(image, out, _told_again(pipe, found, order, model))
    worst = difference(before, image)
    print(f"{out} {verdict(worst, found)}")
    return int(worst is None or worst > _WORST)


def read_carried(file: Path) -> dict[str, str]:
    """All that a picture needs to be drawn again; raises UserError for what it lacks."""
    if not file.is_file():
        raise UserError(f"FILE {file} is not there; give a PNG that `calotype generate` or the demo drew.")
    found = read_facts(file)
    if not found:
        what = "is no PNG that can be read" if found is None else "does not carry how it was drawn"
        raise UserError(f"FILE {file} {what}; give a PNG that `calotype generate` or the demo drew, as it was saved.")
    for name, why in _MORE.items():
        if name in found:
            raise UserError(f"FILE {file} {why}.")
    lacking = [name for name in _NEEDED if name not in found]
    if lacking:
        raise UserError(
            f"FILE {file} does not carry {', '.join(lacking)}, as an older version wrote it; draw with what it has by "
            "`calotype generate`."
        )
    if not found["model"]:
        raise UserError(f"FILE {file} was drawn by a model that was never saved; there is nothing to draw it with.")
    return found


def order_of(found: dict[str, str], file: Path) -> Order:
    """The order that a picture carries; raises UserError for what nobody may ask."""
    try:
        fast, (height, width) = found["fast"] == "yes", _numbers(found, "size", int, "x")
        order = Order(
            seed=_numbers(found, "seed", int)[0],
            num_inference_steps=_numbers(found, "steps", int)[0],
            guidance_scale=None if fast else _numbers(found, "guidance", float)[0],
            guidance_interval=tuple(_numbers(found, "guidance-interval", float, " ")),
            guidance_rescale=_numbers(found, "guidance-rescale", float)[0],
            sampler=None if fast else _sampler(found),
            fast=fast,
            height=height,
            width=width,
            reproducible=found["reproducible"] == "yes",
        )
        order.check(found["label"], 1)
        order.check_pixels(1, (height, width))
        if found["precision"] not in ("fp32", "bf16"):
            raise ValueError(f"precision {found['precision'][:40]!r} must be fp32 or bf16.")
    except ValueError as error:
        raise UserError(f"FILE {file} carries what cannot be: {translated(str(error), FLAGS)}") from None
    return order


def _numbers(found: dict[str, str], name: str, kind: type, between: str | None = None) -> list:
    """The numbers of a fact, two with something `between` them; raises ValueError."""
    words = found[name].split(between) if between else [found[name]]
    try:
        numbers = [kind(word) for word in words]
        if len(numbers) == (2 if between else 1):
            return numbers
    except ValueError:
        pass
    raise ValueError(f"{name} {found[name][:40]!r} cannot be read.")


def _sampler(found: dict[str, str]) -> str | None:
    """The name of the sampler; None for the scheduler that was saved, which is written by its class."""
    return found["sampler"] if found["sampler"].removeprefix("flow-") in SAMPLERS else None


def _nearby(file: Path, found: dict[str, str]) -> Path:
    """The model that drew a picture, in a folder above the picture or above this one; raises UserError."""
    here = [folder.resolve() for folder in (file.parent, Path.cwd())]
    seen = set()
    for folder in (above for place in here for above in (place, *place.parents)):
        if folder not in seen and _draws(folder, found):
            return folder
        seen.add(folder)
    raise UserError(
        f"--model: no folder above {file} or this one holds the model {found['model'][:40]!r} that drew it; give it by "
        "that flag."
    )


def _draws(folder: Path, found: dict[str, str]) -> bool:
    try:
        return _network(find(folder), found) == found["model"]
    except (OSError, UserError):
        return False


def _network(folder: Path, found: dict[str, str]) -> str:
    return facts.about(folder, "student" if found["fast"] == "yes" else "unet")["model"]


def _refuse_other_model(folder: Path, found: dict[str, str], settings) -> None:
    """Only the same weights draw the same picture."""
    about = facts.about(folder, "student" if found["fast"] == "yes" else "unet")
    for name, what in (("model", "the diffusion model"), ("parts", "another part, such as the autoencoder")):
        if about[name] != found[name]:
            raise UserError(
                f"--model {folder}: {what} is {about[name]!r}, but {settings.file} was drawn by "
                f"{found[name][:40]!r}; give the model that drew it."
            )


def _drawn(pipe: LatentDiffusionPipeline, found: dict[str, str], order: Order) -> Image.Image:
    said: dict[str, Any] = {name: value for name, value in order._asdict().items() if name != "preview"}
    with for_users(found["precision"]):
        return pipe(found["label"] or None, 1, **said).images[0]


def _told_again(pipe, found: dict[str, str], order: Order, model: Path) -> dict[str, str]:
    carried = facts.drawn(pipe, order, found["precision"])
    about = facts.about(find(model), "student" if order.fast else "unet")
    return {"label": found["label"], "seed": order.seed} | carried | about


def _refuse_itself(out: Path, file: Path) -> None:
    if out.resolve() == file.resolve():
        raise UserError(f"--out {out} is FILE itself, which is kept to compare with; give another name.")


def _pixels(file: Path) -> Image.Image:
    """The old picture as it is, with no mode changed; raises UserError where it is damaged or too large."""
    try:
        with Image.open(file, formats=("PNG",)) as old:
            if old.width * old.height > MOST.pixels:
                raise UserError(f"FILE {file} has {old.width}x{old.height} pixels, which nothing here draws.")
            old.load()
            return old
    except (OSError, SyntaxError) as error:  # Pillow reports a broken PNG chunk as a SyntaxError
        raise UserError(f"FILE {file} is damaged ({first_line(error)}); give the PNG as it was saved.") from None


def difference(before: Image.Image, image: Image.Image) -> int | None:
    """The largest difference of two pictures, of 255; None where they have other sizes or modes."""
    if before.size != image.size or before.mode != image.mode:
        return None
    return int(np.abs(np.asarray(before, dtype=int) - np.asarray(image, dtype=int)).max())


def verdict(worst: int | None, found: dict[str, str]) -> str:
    """What the comparison says, in words."""
    if worst == 0:
        return "is the same picture, bit by bit."
    if worst is None:
        return "has another size or mode than the picture in FILE; that was changed after it was drawn."
    there = f"{found.get('device', 'unknown')[:60]}, {found.get('software', 'unknown')[:40]}"
    if worst <= _WORST:
        why = "it was drawn" if found["reproducible"] == "yes" else "it was drawn without --reproducible, or"
        return f"is the same picture up to {worst} of 255; {why} on another machine ({there!r})."
    return (
        f"differs by up to {worst} of 255: FILE was changed after it was drawn, or numbers are rounded in another way "
        f"where it was ({there!r})."
    )
