"""Recipes take turns (A B A B) in one process; what counts is the CPU time of one thread, or a GPU's own clock."""

import os
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Ratio(NamedTuple):
    """The median of the ratios of neighbours, and how far they spread (10 and 90 %)."""

    median: float
    low: float
    high: float


def one_thread() -> None:
    """Use one thread from here on, so that CPU time is the time of the work."""
    torch.set_num_threads(1)


def seconds(work: Callable[[], Any]) -> float:
    """What one call takes: on a GPU between two events, else CPU seconds of this process."""
    if not torch.cuda.is_available():
        began = time.process_time()
        work()
        return time.process_time() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000


def take_turns(recipes: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each recipe's calls, a list over the rounds; the first rounds warm up and are not counted."""
    found: dict[str, list[float]] = {name: [] for name in recipes}
    for number in range(warm_up + rounds):
        for name, work in recipes.items():
            taken = seconds(work)
            if number >= warm_up:
                found[name].append(taken)
    return found


def median(values: list[float]) -> float:
    """The middle one."""
    return torch.tensor(values, dtype=torch.float64).median().item()


def times_as_fast(base: list[float], values: list[float]) -> Ratio:
    """How many times as fast `values` are as `base`, by neighbours of the same round."""
    ratios = torch.tensor(base, dtype=torch.float64) / torch.tensor(values, dtype=torch.float64)
    low, middle, high = ratios.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Ratio(middle, low, high)


def machine() -> dict[str, Any]:
    """Where the figures were found, in words."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used"
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}
