"""Checkpoints without pickle: safetensors and JSON under a manifest, written beside and renamed.

A folder counts as a checkpoint only if every file has the size and SHA-256 that its manifest names. The old one is
removed after the new one has reached the disk, so a crash at any instant leaves a good one.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calotype.disk import DiskFull, make_folder, publish, refuse_full, sha256, sync
from calotype.disk import write_text as write_text  # it is also known by this name
from calotype.errors import UserError, is_disk_full

Tensors = dict[str, Tensor]
_MANIFEST, _STATE = "manifest.json", "state.json"
_WAITS = (5.0, 15.0)  # seconds before the last checkpoint of a run is tried again on a full disk


def save(
    folder: Path, step: int, parts: dict[str, Tensors], state: dict[str, Any], keep: int, also: int | None = None
) -> Path:
    """Write `parts` (one safetensors file each) and `state` as folder/step-XXXXXXXX; keep the newest `keep`.

    The checkpoint of step `also` is kept too, so that a run can go back to it. Raises DiskFull if there is no room;
    older checkpoints are then as they were.
    """
    final = _named(folder, step)
    if verify(final) is None:
        return final
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        _write(temporary, parts, {"step": step, **state})
        publish(temporary, final)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (isinstance(error, DiskFull) or is_disk_full(error)):
            raise
        figures = f" ({error})" if isinstance(error, DiskFull) else ""
        raise DiskFull(f"no space left in {folder} for the checkpoint of step {step}{figures}") from None
    _remove_older(folder, final, keep, also)
    return final


def insist(save: Callable[[], Path], say: Callable[[str], None], last: bool) -> None:
    """Save; where the disk is full a line says so and the run goes on, for there will be another time.

    The `last` checkpoint of a run has no other time: it is tried again after some seconds, and then UserError raised.
    """
    for wait in (*_WAITS, None) if last else (None,):
        try:
            save()
            return
        except DiskFull as full:
            if wait is not None:
                say(f"{full}; free some: it is tried again in {wait:.0f} seconds.")
                time.sleep(wait)
            elif last:
                raise UserError(
                    f"{full}; free some and give the same command again: it goes on from the last checkpoint."
                ) from None
            else:
                say(f"{full}; the run goes on, and tries again at the next one. Free some, or it may lose its work.")


def load(folder: Path, up_to: int | None = None) -> tuple[dict[str, Tensors], dict[str, Any]] | None:
    """Parts and state of the newest intact checkpoint (not after step `up_to`), or None where there is none.

    Says what it passes over; raises UserError where there are checkpoints and every one of them is damaged.
    """
    candidates = [path for path in steps(folder) if up_to is None or path <= _named(folder, up_to)]
    for candidate in reversed(candidates):
        fault = verify(candidate)
        if fault:
            print(f"Checkpoint {candidate} is passed over: {fault}.")
            continue
        names = json.loads((candidate / _MANIFEST).read_text())
        parts = {Path(name).stem: load_file(candidate / name) for name in names if name != _STATE}
        return parts, json.loads((candidate / _STATE).read_text())
    if candidates:
        raise UserError(f"{folder}: none of {len(candidates)} checkpoints is intact; restore one, or give --fresh.")
    return None


def _named(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[Path]:
    """The checkpoint folders, by step."""
    return sorted(folder.glob("step-????????"))


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        text = (checkpoint / _MANIFEST).read_text()
        manifest = json.loads(text)
        if _as_text(manifest) != text or _STATE not in manifest:
            return f"{_MANIFEST} is damaged"
        for name, expected in manifest.items():
            file = checkpoint / name
            if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
                return f"{name} is damaged"
        step = json.loads((checkpoint / _STATE).read_text())["step"]
        if checkpoint.name != _named(checkpoint, step).name:
            return f"it holds step {step}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it is incomplete ({error})"
    return None


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


def _write(temporary: Path, parts: dict[str, Tensors], state: dict[str, Any]) -> None:
    """All files of a checkpoint, the manifest last, if there is room for them."""
    make_folder(temporary.parent)
    _remove_leftovers(temporary.parent)
    refuse_full(temporary.parent, sum(t.numel() * t.element_size() for part in parts.values() for t in part.values()))
    temporary.mkdir()
    settled: dict[str, Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor() as pool:  # the disk is busy with one file while the next is written
        for name, tensors in parts.items():
            file = temporary / f"{name}.safetensors"
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, file)
            settled[file.name] = pool.submit(_settle, file)
        (temporary / _STATE).write_text(json.dumps(state))
        settled[_STATE] = pool.submit(_settle, temporary / _STATE)
    manifest = {name: entry.result() for name, entry in sorted(settled.items())}
    (temporary / _MANIFEST).write_text(_as_text(manifest))


def _settle(file: Path) -> dict[str, Any]:
    """Bring a file to the disk; returns its entry in the manifest."""
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _as_text(manifest: dict[str, dict[str, Any]]) -> str:
    return json.dumps(manifest, indent=1)


def _remove_older(folder: Path, final: Path, keep: int, also: int | None) -> None:
    kept = [path for path in steps(folder) if path <= final][-keep:]
    if also is not None:
        kept.append(_named(folder, also))
    for old in set(steps(folder)) - set(kept):
        gone = old.with_name(f".{old.name}.gone")  # a kill on the way must leave no half of it under its name
        old.rename(gone)
        shutil.rmtree(gone)


def _remove_leftovers(folder: Path) -> None:
    """Half-written folders of a killed process (the run folder is locked, so nobody else is writing)."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
