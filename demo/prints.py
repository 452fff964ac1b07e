"""Finished pictures as PNG files in Gradio's cache that carry their settings, and the way back."""

import re
import secrets
from pathlib import Path

from gradio.utils import get_upload_folder
from PIL import Image

from calotype.demo.uploads import Source
from calotype.errors import UserError
from calotype.pipeline.generate import write_png

SHOWN = 384  # pixels of the longer side of an animation
FRAME_MILLISECONDS = 110
_PREFIX = "calotype:"


def file_prints(images: list[Image.Image], facts: list[dict]) -> list[str]:
    """Write each picture with its facts and return the paths; Gradio serves them there and deletes them in time."""
    folder = _folder()
    files = [folder / f"{_name(fact)}-{i}.png" for i, fact in enumerate(facts, start=1)]
    for image, file, fact in zip(images, files, facts, strict=True):
        write_png(image, file, fact)
    return [str(file) for file in files]


def file_animation(images: list[Image.Image], name: str) -> str:
    """Write pictures as a WebP that goes forth and back for ever, small ones enlarged by whole pixels; its path."""
    folder = _folder()
    folder.mkdir(parents=True)
    factor = max(1, SHOWN // max(images[0].size))
    size = tuple(side * factor for side in images[0].size)
    first, *rest = [image.resize(size, Image.Resampling.NEAREST) for image in (*images, *images[-2:0:-1])]
    file = folder / f"{name}.webp"
    first.save(file, save_all=True, append_images=rest, duration=FRAME_MILLISECONDS, loop=0, lossless=True)
    return str(file)


def _folder() -> Path:
    return Path(get_upload_folder()) / f"prints-{secrets.token_hex(16)}"


def _name(facts: dict) -> str:
    label = re.sub(r"[^\w-]+", "-", str(facts.get("label", ""))).strip("-")[:40]
    return "-".join(filter(None, ("calotype", label, str(facts.get("seed", "")))))


def read_facts(source: Source | None) -> dict[str, str]:
    """The settings that a PNG of ours carries; raises UserError where there are none. No pixel is decoded."""
    if source is None:
        raise UserError("no picture yet; drop a PNG made here on the field")
    try:
        with Image.open(source, formats=("PNG",)) as image:  # reads what stands before the pixels
            facts = {name.removeprefix(_PREFIX): str(text) for name, text in image.info.items() if _is_ours(name)}
    except Exception:  # Pillow raises almost anything over a damaged file
        raise UserError("this is no PNG that can be read; drop one made here") from None
    if "seed" not in facts:
        raise UserError("this picture holds no settings; drop a PNG made here or by `calotype generate`")
    return facts


def _is_ours(name) -> bool:
    return isinstance(name, str) and name.startswith(_PREFIX)
