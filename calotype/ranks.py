"""Several processes of one run: they must have been given the same, and go on holding the same."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from calotype.complaints import flag
from calotype.errors import UserError

_MAY_DIFFER = {"workers", "trackers"}


def refuse_differences(accelerator: Accelerator, settings: Any, more: dict[str, str]) -> None:
    """Raise UserError in every process if one has other settings, other data or other code than the first.

    `more` names what else must be alike, such as the fingerprint of the data. Called before anything is built, so that
    no process waits for another that has a network of another shape.
    """
    if accelerator.num_processes == 1:
        return
    own = {flag(name): value for name, value in settings.to_json().items() if name not in _MAY_DIFFER}
    own |= more | {"the code": code_hash(), "torch": torch.__version__}
    first, *others = gather_object([own])
    for rank, other in enumerate(others, start=1):
        for name in dict.fromkeys([*first, *other]):
            if first.get(name) != other.get(name):
                raise UserError(
                    f"process {rank} differs from process 0 in {name}: {other.get(name)}, not {first.get(name)}; start "
                    "every process with the same command, on the same data and the same version of calotype."
                )


def refuse_drift(accelerator: Accelerator, modules: dict[str, nn.Module], step: int) -> None:
    """Raise UserError in every process if one holds other weights than the first, by one bit or more."""
    if accelerator.num_processes == 1:
        return
    first, *others = gather_object([{name: _checksum(module) for name, module in modules.items()}])
    for rank, other in enumerate(others, start=1):
        if wrong := [name for name in first if first[name] != other[name]]:
            raise UserError(
                f"process {rank} has other weights than process 0 ({wrong[0]}) at step {step}; its memory or its way "
                "to the others may be faulty. The same command goes on from the last checkpoint."
            )


def code_hash() -> str:
    """A hash of the modules of calotype that this process has loaded."""
    files = {module.__file__ for name, module in sys.modules.items() if name.startswith("calotype.")}
    texts = (Path(file).read_bytes() for file in sorted(filter(None, files)))
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def _checksum(module: nn.Module) -> int:
    """A sum over the bits of the weights, found where they lie; two networks that differ hardly ever share it."""
    tensors = [tensor.detach().float() for tensor in module.state_dict().values() if tensor.numel()]
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for number, tensor in enumerate(tensors, start=1):
        total += number * tensor.contiguous().view(torch.int32).long().sum()
    return int(total)
