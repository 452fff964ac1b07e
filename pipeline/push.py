"""`calotype push`: a model folder to the Hub, or a list of what would be sent where that cannot be done."""

import json
import re
from pathlib import Path

from calotype.checkpoint import sha256, write_text
from calotype.errors import UserError
from calotype.pipeline.generate import find

_SENT = {".json", ".safetensors", ".py", ".md", ".png", ".txt", ".onnx"}  # and nothing that runs when it is loaded


def main(settings) -> None:
    """Send the model; with --dry-run, or without a connection, write MODEL.push.json instead."""
    folder = find(settings.model)
    set_licence(folder / "README.md", settings.licence)
    files = files_of(folder)
    plan = {"repository": settings.repository, "private": settings.private, "licence": licence_of(folder / "README.md")}
    plan |= {"files": {str(file.relative_to(folder)): _facts(file) for file in files}}
    note = folder.with_name(f"{folder.name}.push.json")
    for name, facts in plan["files"].items():
        print(f"{facts['bytes']:>12,}  {name}")
    if plan["licence"] is None:
        print("The model card names no licence; --licence cc-by-4.0 (or another) does.")
    if settings.dry_run:
        write_text(note, json.dumps(plan, indent=1))
        print(f"Nothing was sent; what would be is in {note}.")
        return
    try:
        url = _send(folder, settings.repository, settings.private)
    except _refusals() as error:
        write_text(note, json.dumps(plan, indent=1))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{settings.repository} could not be reached ({reason}); what would be sent is in {note}."
        ) from None
    print(f"{len(files)} files are at {url}")


def files_of(folder: Path) -> list[Path]:
    """What belongs to a model; raises UserError for anything else that lies there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    strangers = [file for file in files if file.suffix not in _SENT or file.name.startswith(".")]
    if strangers:
        raise UserError(
            f"MODEL {folder} holds {strangers[0].relative_to(folder)}, which is no part of a model; remove it."
        )
    return files


def set_licence(card: Path, licence: str | None) -> None:
    """Write the licence into a model card's front matter, in the place of another."""
    if licence is None:
        return
    _, front, text = card.read_text(encoding="utf-8").split("---\n", 2)
    lines = [line for line in front.splitlines() if not line.startswith("license:")]
    write_text(card, "\n".join(["---", f"license: {licence}", *lines, "---\n"]) + text)


def licence_of(card: Path) -> str | None:
    """The licence that a model card names."""
    found = re.search(r"^license: (.+)$", card.read_text(encoding="utf-8") if card.is_file() else "", re.MULTILINE)
    return found and found[1]


def _facts(file: Path) -> dict:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _send(folder: Path, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi(library_name="calotype")
    api.create_repo(repository, private=private, exist_ok=True)
    allowed = [f"*{suffix}" for suffix in sorted(_SENT)]
    api.upload_folder(
        repo_id=repository, folder_path=folder, allow_patterns=allowed, commit_message="A model made with calotype"
    )
    return f"{api.endpoint}/{repository}"


def _refusals() -> tuple[type[Exception], ...]:
    """What the Hub's client raises: no connection, no account, no permission, a name it does not take."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    return (httpx.HTTPError, HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError)
