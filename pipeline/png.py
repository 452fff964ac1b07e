"""Pictures as PNG files that carry how they were made as text, and the way back to it."""

from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from calotype.errors import UserError

_PREFIX = "calotype:"


def write_png(image: Image.Image, file: Path, facts: dict) -> None:
    """Write a PNG that carries how it was made as text; another's picture is never overwritten."""
    if file.exists() and not _carries_facts(file):
        raise UserError(f"--out: {file} is there already and not drawn by calotype; give another folder.")
    info = PngInfo()
    for name, value in facts.items():
        info.add_itxt(f"{_PREFIX}{name}", str(value))
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, pnginfo=info)


def read_facts(source: str | Path | BinaryIO) -> dict[str, str] | None:
    """How a PNG was made, {} where it does not say; None for what is no PNG that can be read. No pixel is decoded."""
    try:
        with Image.open(source, formats=("PNG",)) as image:  # reads what stands before the pixels
            found = {name: str(text) for name, text in image.info.items() if isinstance(name, str)}
    except Exception:  # Pillow raises almost anything over a damaged file
        return None
    return {name.removeprefix(_PREFIX): text for name, text in found.items() if name.startswith(_PREFIX)}


def _carries_facts(file: Path) -> bool:
    return "model" in (read_facts(file) or {})
