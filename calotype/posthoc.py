"""Weight averages of any length after the run, out of snapshots of two of them (Karras et al. 2024, section 3.2)."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from calotype.disk import rename_file
from calotype.ema import PowerEma, gamma_of_width
from calotype.errors import UserError

_FILE = re.compile(r"step-(\d+)\.safetensors")


class Profile(NamedTuple):
    """A power-function average after `step` steps: weights at step tau count as tau^gamma, up to `step`."""

    step: int
    gamma: float


def inner_product(a: Profile, b: Profile) -> float:
    """The integral over tau of p_a p_b, with p(tau) = (gamma + 1) tau^gamma / step^(gamma + 1) up to `step`, else 0."""
    end = min(a.step, b.step)
    ratios = (end / a.step) ** (a.gamma + 1) * (end / b.step) ** (b.gamma + 1)  # powers of up to 1 cannot overflow
    return (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1) * ratios / end


def combine(known: list[Profile], wanted: Profile) -> np.ndarray:
    """Factors of the known averages whose sum comes closest to the wanted one, in the least squares of profiles."""
    gram = np.array([[inner_product(a, b) for b in known] for a in known])
    return np.linalg.lstsq(gram, np.array([inner_product(a, wanted) for a in known]), rcond=1e-12)[0]


def write_snapshot(folder: Path, step: int, tracks: list[dict[str, PowerEma]]) -> None:
    """Write averages of two widths, by module, as they stand after `step` steps, in fp16 as in the paper."""
    folder.mkdir(exist_ok=True)
    tensors = {
        f"{ema.gamma!r}/{name}/{key}": value.half().contiguous()
        for track in tracks
        for name, ema in track.items()
        for key, value in ema.model.state_dict().items()
    }
    temporary = folder / f".step-{step:08d}"
    save_file(tensors, temporary)
    rename_file(temporary, folder / f"step-{step:08d}.safetensors")


def average(folder: Path, width: float, names: list[str], until: int | None = None) -> dict[str, dict[str, Tensor]]:
    """Weights of the modules `names` averaged with a relative width, after `until` steps (default: the last snapshot).

    Raises UserError where the folder holds no snapshots.
    """
    files = {int(match[1]): file for file in sorted(folder.glob("step-*")) if (match := _FILE.fullmatch(file.name))}
    files = {step: file for step, file in files.items() if until is None or step <= until}
    if not files:
        raise UserError(f"{folder} holds no snapshots of averages; train without --no-snapshots.")
    known, sources = [], []
    for step, file in files.items():
        with safe_open(file, "pt") as snapshot:
            gammas = sorted({key.split("/")[0] for key in snapshot.keys()})  # noqa: SIM118 (no mapping)
        known += [Profile(step, float(gamma)) for gamma in gammas]
        sources += [(file, gamma) for gamma in gammas]
    factors = combine(known, Profile(max(files), gamma_of_width(width)))
    return _sum(sources, factors, names)


def _sum(sources: list[tuple[Path, str]], factors: np.ndarray, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Weighted sums; one snapshot after the other, so that memory holds two models at a time."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for (file, gamma), factor in zip(sources, factors, strict=True):
        with safe_open(file, "pt") as snapshot:
            for key in snapshot.keys():  # noqa: SIM118 (no mapping)
                its_gamma, name, rest = key.split("/", 2)
                if its_gamma == gamma and name in found:
                    part = snapshot.get_tensor(key).float() * factor
                    found[name][rest] = found[name][rest] + part if rest in found[name] else part
    return found


def load_average(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Put averaged weights into a module; whole numbers among its buffers stay as they are."""
    own = module.state_dict()
    floats = {name: value for name, value in weights.items() if own[name].is_floating_point()}
    module.load_state_dict(own | floats)
