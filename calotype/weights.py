"""The one way by which weights come in: safetensors alone, and only those that fit to the last key, in finite numbers.

diffusers and transformers read a folder with missing or superfluous tensors and say so in a log, and never ask whether
the numbers are finite. What somebody else's folder asks for is held against its weights before any of it is built.
"""

import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from calotype.errors import UserError

MOST_JSON = 16_000_000  # bytes; a tokenizer takes a few millions
_NUMBER = 10_000_000  # the largest that makes sense in the settings of a network or scheduler
_CODE = ("auto_map", "quantization_config", "custom_pipelines")  # by which a folder names code to be run
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NAMES = ("diffusion_pytorch_model", "model")  # as diffusers and transformers call their weights


def load_network(cls: type, folder: Path, name: str) -> nn.Module:
    """The network of a class of diffusers or transformers in a folder, in evaluation mode.

    Raises UserError that begins with `name`: for a pickle, for missing, superfluous, misshapen or non-finite tensors.
    """
    _settings(folder, name)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):  # what is missing is filled with random numbers at first
            net, found = cls.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # settings that contradict each other make a constructor raise almost anything
        raise UserError(f"{name}: {folder} cannot be loaded ({first_line(error)}); fetch or make it again.") from None
    for what in ("missing", "unexpected", "mismatched"):
        refuse_keys(found.get(f"{what}_keys"), what, f"{name}: {folder}")
    refuse_non_finite(net, f"{name}: {folder}")
    return net.eval()


def outline_network(cls: type, folder: Path, name: str) -> nn.Module:
    """The same network without its weights (they are on torch's device "meta"), which takes no longer for a large one.

    Raises UserError as `load_network` does, but for what only the weights themselves can tell.
    """
    config = _settings(folder, name)
    try:
        with quiet(), torch.device("meta"):
            return cls.from_config(config).eval()
    except Exception as error:
        raise UserError(f"{name}: {folder} cannot be loaded ({first_line(error)}); fetch or make it again.") from None


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """What a network's config.json says; raises UserError where it, or the list of the tensors, cannot be right."""
    config = read_json(folder / "config.json", name)
    refuse_code_and_bombs(config, f"{name}: {folder / 'config.json'}")
    _refuse_more_layers_than_weights(config, _tensors(folder, name), f"{name}: {folder}")
    return config


@contextmanager
def quiet() -> Iterator[None]:
    """Without the reports that diffusers and transformers write to a log about what is then refused in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(before)


def read_json(file: Path, name: str) -> dict[str, Any]:
    """What a JSON file of settings holds; raises UserError that begins with `name`."""
    try:
        if file.stat().st_size > MOST_JSON:
            raise UserError(
                f"{name}: {file} has more than {MOST_JSON:,} bytes, which no settings have; fetch it again."
            )
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{name}: {file} cannot be read ({error.strerror}); give the folder of a model.") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: {file} is not JSON ({first_line(error)}); fetch or make it again.") from None
    if not isinstance(found, dict):
        raise UserError(f"{name}: {file} holds a {type(found).__name__}, no settings; fetch or make it again.")
    return found


def refuse_code_and_bombs(config: dict[str, Any], name: str) -> None:
    """Raise UserError where settings name code of their own, or numbers that only fill the memory."""
    for key in _CODE:
        if config.get(key):
            raise UserError(f"{name} names {key}, that is code of its own, which is never run; give another model.")
    for key, value in _numbers(config):
        if abs(value) > _NUMBER and value != -math.inf:  # which is how DPM-Solver's config says that nothing is clipped
            raise UserError(f"{name}: {key} is {value:g}, more than any network has; fetch or make it again.")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number in settings, with the key that it stands under."""
    if isinstance(value, dict):
        for inner, item in value.items():
            yield from _numbers(item, str(inner))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, (int, float)):
        yield key, value


def _tensors(folder: Path, name: str) -> int:
    """How many tensors the folder's safetensors hold; raises UserError where there are none or they are damaged."""
    files = [file for stem in _NAMES for file in sorted(folder.glob(f"{stem}*.safetensors"))]
    if not files:
        pickles = [file for file in sorted(folder.iterdir()) if file.suffix in _PICKLES]
        if pickles:
            raise UserError(
                f"{name}: {pickles[0]} is a pickle, which may run anything and is never opened here; have its tensors "
                "written as safetensors, an autoencoder's by `calotype convert`."
            )
        raise UserError(f"{name}: {folder} holds no weights (*.safetensors); fetch or make them again.")
    try:
        return sum(len(_keys(file)) for file in files)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{name}: the weights in {folder} are damaged ({first_line(error)}); fetch them again."
        ) from None


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def _refuse_more_layers_than_weights(config: dict[str, Any], tensors: int, name: str) -> None:
    """A small file of settings must not have a network built that has no end."""
    for key, value in config.items():
        wanted = sum(size for _, size in _numbers(value)) if "layers" in key or "num_" in key and "blocks" in key else 0
        length = len(value) if isinstance(value, list) else 0
        if max(wanted, length) > tensors:
            raise UserError(f"{name}: {key} asks for more layers than there are weights ({tensors}); fetch it again.")


def refuse_keys(keys, what: str, name: str) -> None:
    """Raise UserError that lists tensors which are missing, unexpected or mismatched."""
    keys = sorted(key if isinstance(key, str) else str(key[0]) for key in keys or ())
    if keys:
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        raise UserError(f"{name} has {what} tensors: {', '.join(keys[:5])}{more}; fetch or make it again.")


def refuse_non_finite(net: nn.Module, name: str) -> None:
    """Raise UserError that lists the tensors of a network which hold NaN or infinity."""
    found = net.state_dict().items()
    keys = sorted(key for key, value in found if value.is_floating_point() and not torch.isfinite(value).all())
    if keys:
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        raise UserError(
            f"{name}: {', '.join(keys[:5])}{more}: not all numbers there are finite; fetch or make it again."
        )


def first_line(error: BaseException) -> str:
    """The beginning of what an error says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
