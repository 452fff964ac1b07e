"""The list of hashes in a model folder: a flipped bit in it is noticed before anything is drawn."""

import json
from pathlib import Path

from calotype import __version__
from calotype.checkpoint import sha256, write_text
from calotype.errors import UserError
from calotype.weights import read_json

FILE = "sha256.json"
FORMAT = 1  # of the model folder; a later one is refused
_FREE = ("README.md", "samples.png", FILE)  # what a user may write over
_BESIDE = "onnx/"  # for other programs, and as large as all the rest
_NEEDED = ("model_index.json", "calotype.json")  # what else lies at the top may be taken away


def write(folder: Path) -> None:
    """Write the SHA-256 of every file that is loaded here to sha256.json, which stock diffusers passes over."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    found = {name: sha256(file) for name, file in files.items() if name not in _FREE and not name.startswith(_BESIDE)}
    content = {"format": FORMAT, "software": f"calotype {__version__}", "files": found}
    write_text(folder / FILE, json.dumps(content, indent=1) + "\n")


def verify(folder: Path, name: str) -> None:
    """Raise UserError that begins with `name` where a file is not as the list says; a folder without one passes."""
    if not (folder / FILE).is_file():
        return
    content = read_json(folder / FILE, name)
    _refuse_later_format(content, name)
    files = content.get("files")
    if not isinstance(files, dict):
        raise UserError(f"{name}: {folder / FILE} is damaged; export the model again.")
    for file, expected in files.items():
        path = folder / file
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{name}: {FILE} names {file!r}, which lies outside the folder; export the model again.")
        if "/" not in file and file not in _NEEDED and not path.exists():
            continue
        if not path.is_file() or sha256(path) != expected:
            what = "has changed since" if path.is_file() else "is not there, but was when"
            raise UserError(
                f"{name}: {file} {what} the model was exported; fetch or export it again, or delete {FILE} if you "
                "changed it yourself."
            )


def _refuse_later_format(content: dict, name: str) -> None:
    found = content.get("format")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f"{name}: {FILE} has the format {found!r}, which there is not; export the model again.")
    if found > FORMAT:
        writer = str(content.get("software", "a later calotype"))[:40]
        raise UserError(f"{name} has format {found}, written by {writer}; this reads up to {FORMAT}: update calotype.")
