"""Checkpoints without pickle: safetensors and JSON under a manifest, written beside and renamed.

A folder counts as a checkpoint only if every file has the size and SHA-256 that its manifest names. The old one is
removed after the new one has reached the disk, so a crash at any instant leaves a good one.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calotype.errors import UserError, is_disk_full

Tensors = dict[str, Tensor]
_MANIFEST = "manifest.json"


def save(
    folder: Path, step: int, parts: dict[str, Tensors], state: dict[str, Any], keep: int, also: int | None = None
) -> Path:
    """Write `parts` (one safetensors file each) and `state` as folder/step-XXXXXXXX; keep the newest `keep`.

    The checkpoint of step `also` is kept too, so that a run can go back to it. Raises UserError if the disk is full;
    older checkpoints are then as they were.
    """
    final = _named(folder, step)
    if verify(final) is None:
        return final
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        _remove_leftovers(folder)
        temporary.mkdir(parents=True)
        for name, tensors in parts.items():
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}))
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in _files(temporary)}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        publish(temporary, final)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not is_disk_full(error):
            raise
        raise UserError(
            f"no space left in {folder} for the checkpoint of step {step}; free some space and give the same command "
            "again: it goes on from the last checkpoint."
        ) from None
    kept = [path for path in steps(folder) if path <= final][-keep:]
    if also is not None:
        kept.append(_named(folder, also))
    for old in set(steps(folder)) - set(kept):
        gone = old.with_name(f".{old.name}.gone")  # a kill on the way must leave no half of it under its name
        old.rename(gone)
        shutil.rmtree(gone)
    return final


def load(folder: Path, up_to: int | None = None) -> tuple[dict[str, Tensors], dict[str, Any]] | None:
    """Parts and state of the newest intact checkpoint (not after step `up_to`), or None; says what it passed over."""
    candidates = [path for path in steps(folder) if up_to is None or path <= _named(folder, up_to)]
    for candidate in reversed(candidates):
        fault = verify(candidate)
        if fault:
            print(f"Checkpoint {candidate} is passed over: {fault}.")
            continue
        parts = {file.stem: load_file(file) for file in candidate.glob("*.safetensors")}
        return parts, json.loads((candidate / "state.json").read_text())
    return None


def _named(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[Path]:
    """The checkpoint folders, by step."""
    return sorted(folder.glob("step-????????"))


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        for name, expected in manifest.items():
            file = checkpoint / name
            if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it is incomplete ({error})"
    return None


def publish(temporary: Path, final: Path) -> None:
    """Bring a finished folder to the disk and give it its name in one atomic step, replacing an older one."""
    for path in [*_files(temporary), *[p for p in temporary.rglob("*") if p.is_dir()], temporary]:
        _fsync(path)
    replaced = final.with_name(f".{final.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    _fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write a small file so that readers see the old text or the new one, never a part."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    temporary.replace(file)
    _fsync(file.parent)


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_hash(folder: Path) -> str:
    """One hash for the weights and settings of a saved diffusers model."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The state of an optimiser as `{parameter index}.{name}` -> tensor; learning rates follow from the step."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items() if value is not None}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Put back what `optimizer_tensors` took out."""
    state: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        index, _, entry = name.partition(".")
        state.setdefault(int(index), {})[entry] = tensor.clone()  # what was loaded is a view of the file
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_module(module: nn.Module, tensors: Tensors) -> None:
    """Copy tensors into a module; missing, extra or misshapen ones raise."""
    module.load_state_dict(tensors, strict=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fsync(path: Path) -> None:
    if os.name == "nt":  # Windows syncs neither a folder nor a file that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Half-written folders of a killed process (the run folder is locked, so nobody else is writing)."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
