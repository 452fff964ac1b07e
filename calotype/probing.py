"""What the probes of both stages share: requests as lines of JSON, two clocks, and what any stage costs.

A probe builds a real stage and takes real steps; what it tells are seconds (by the clock, and of the processor) and
bytes.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from calotype.data import Batch
from calotype.device import device
from calotype.errors import UserError
from calotype.loop import Run
from calotype.memory import ran_out
from calotype.planning import Cost

_MOST_STEPS = 12  # that are timed
_FEWEST = 3
_CLEAR = Path("/proc/self/clear_refs")  # Linux: 5 written there forgets the high-water mark of memory
_STATUS = Path("/proc/self/status")


def serve(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer each line of JSON on stdin with one on stdout, until there are no more; everything else said is stderr's.

    The first line of stdout tells that the imports are done, and what they took of the processor.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"start_cpu": time.process_time()}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            found = measure(json.loads(line))
        except UserError as error:
            found = {"error": str(error)}
        print(json.dumps(found), file=answers, flush=True)


def cost(work: Callable[[], Any]) -> Cost:
    """What one call takes, the device's work included."""
    _wait()
    began, cpu = time.perf_counter(), time.process_time()
    work()
    _wait()
    return Cost(time.perf_counter() - began, time.process_time() - cpu)


def median(costs: list[Cost]) -> Cost:
    """The middle one by each clock."""
    return Cost(*(sorted(values)[len(values) // 2] for values in zip(*costs, strict=True)))


def of_steps(stage, limit: float) -> dict[str, Any]:
    """What an optimiser step takes in time and memory; `limit` is how many seconds it may take to find out.

    It begins with a few examples. Where the whole batch would take too long, or is unlikely to fit into memory, its
    cost follows from theirs, in proportion, and `whole` is false.
    """
    batches = stage.batches(0)
    batch = next(batches)
    size = len(batch.x)
    few = next(n for n in (8, 4, 2, 1) if size % n == 0 and (n < size or n == 1))
    used = memory_in_use()
    small, small_peak = _steps(stage, lambda: _first(batch, few), limit / 8, 1)
    each = max(small_peak - used, 0) / few
    step, peak = small.times(size / few), small_peak + each * (size - few)
    whole = small.seconds * size / few * 4 < limit and peak < free_memory()
    if whole:
        step, peak = _steps(stage, lambda: next(batches), limit, _FEWEST)
        each = max(peak - small_peak, 0) / max(size - few, 1)
    return {"examples": size, "whole": whole, "step": step, "peak": int(peak), "each": int(each)}


def of_run(run: Run) -> dict[str, Any]:
    """What saving a checkpoint takes, and how many bytes it holds."""
    taken = cost(run._save)
    folder = max((run.out / "checkpoints").iterdir())
    parameters = sum(p.numel() for model in run.stage.models.values() for p in model.parameters())
    return {"checkpoint": taken, "checkpoint_bytes": size_of(folder), "parameters": parameters}


def _steps(stage, batch: Callable[[], Batch], limit: float, fewest: int) -> tuple[Cost, float]:
    """The middle cost of some steps after one that warms up, and the most memory in use meanwhile, in bytes."""
    forget_peak()
    stage.step(batch(), 0)
    costs: list[Cost] = []
    while len(costs) < fewest or (len(costs) < _MOST_STEPS and sum(c.seconds for c in costs) < limit):
        costs.append(cost(lambda: stage.step(batch(), len(costs) + 1)))
    return median(costs), peak_memory()


def _first(batch: Batch, count: int) -> Batch:
    return batch.part(0, len(batch.x) // count)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def forget_peak() -> None:
    """Let `peak_memory` begin anew, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5")


def peak_memory() -> float:
    """The most bytes that were in use: of the GPU, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return memory_in_use()


def memory_in_use() -> float:
    """Bytes in use now: of the GPU, else of this process."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def free_memory() -> int:
    """Bytes that a run may take: of the GPU, else of this machine, what this process holds included."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    limit = Path("/sys/fs/cgroup/memory.max")
    words = limit.read_text().split() if limit.is_file() else []
    limits = [int(word) for word in words if word.isdigit()]
    return min([psutil.virtual_memory().available + psutil.Process().memory_info().rss, *limits])


def refused(error: Exception) -> UserError:
    """One line for a probe that ran out of memory; anything else is raised again."""
    if not ran_out(error):
        raise error
    return UserError("a few examples do not fit into memory; give a smaller --preset or --image-size.")


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
    elif device().type == "mps":
        torch.mps.synchronize()
