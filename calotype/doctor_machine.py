"""`calotype doctor`: device, processors, precision and weights, in a process of its own that may fail.

`python -m calotype.doctor_machine` prints its findings as one line of JSON.
"""

import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from calotype.finding import Finding, examine, in_one_line

_GB = 1e9
_SIDE = 512  # of the matrices
_RIGHT = 0.02  # relative error of a product in bf16, whose numbers have 8 bits
_TRIES = 5
_LITTLE = 4 * _GB
_NVIDIA = Path("/proc/driver/nvidia/version")
_INSTALL_TORCH = "Install the torch build for this machine: https://pytorch.org/get-started/locally"


def main() -> None:
    """Print the findings as one line of JSON, the last one."""
    examinations = {"Device": device, "Processors": processors, "Precision": precision, "Weights": weights}
    print(json.dumps([finding for what, of in examinations.items() for finding in examine(what, of)]))


def device() -> Finding:
    """The device that everything will run on, tried with a product of matrices."""
    import torch
    from torchvision.ops import nms

    try:  # a torchvision of another build registers no operators
        nms(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([1.0]), 0.5)
    except RuntimeError as error:
        pair = f"torch {torch.__version__} and torchvision do not fit ({in_one_line(error)})"
        return Finding("Device", "FAIL", pair, "pip install --upgrade torch torchvision, both from one place.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return _cuda()
    said = next((in_one_line(str(w.message)) for w in caught if "CUDA" in str(w.message)), "")
    if torch.backends.mps.is_available():
        return Finding("Device", "pass", f"Apple GPU (MPS), {platform.processor()}; {_build()}")
    return _without_gpu(said)


def _cuda() -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(0)
    many = f"{torch.cuda.device_count()} x " if torch.cuda.device_count() > 1 else ""
    text = (
        f"{many}{properties.name}, {properties.total_memory / _GB:.0f} GB, {_build()}, driver {_driver() or 'unknown'}"
    )
    try:
        x = torch.eye(_SIDE, device="cuda")
        right = bool((x @ x == x).all())
    except RuntimeError as error:
        return Finding("Device", "FAIL", f"{text}: {in_one_line(error)}", _INSTALL_TORCH)
    if not right:
        return Finding("Device", "FAIL", f"{text}: a product of matrices is wrong", "Have the card checked.")
    return Finding("Device", "pass", text)


def _without_gpu(said: str) -> Finding:
    """The CPU, and whether it was meant."""
    text = f"CPU, {_cpu_name()}; {_build()}"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return Finding(
            "Device", "note", f"{text}; CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides GPUs"
        )
    if driver := _driver():
        found = f"there is an NVIDIA card (driver {driver}), but this torch does not reach it; {_build()}"
        return Finding("Device", "FAIL", f"{found}{f': {said}' if said else ''}", _INSTALL_TORCH)
    return Finding("Device", "pass", text)


def _build() -> str:
    """Which torch this is."""
    import torch

    cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else None
    rocm = f"for ROCm {torch.version.hip}" if torch.version.hip else None
    return f"torch {torch.__version__} {cuda or rocm or 'for CPUs'}"


def _driver() -> str:
    """The version of NVIDIA's kernel driver, or empty."""
    if not _NVIDIA.is_file():
        return ""
    words = _NVIDIA.read_text(errors="replace").split()
    return next((word for word in words if word.count(".") in (1, 2) and word.replace(".", "").isdigit()), "unknown")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def processors() -> Finding:
    """Cores that we may use, threads that torch starts, and memory."""
    import psutil
    import torch

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup("cpu.max")
    share = int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0].isdigit() else allowed
    limit = _cgroup("memory.max")
    memory = min([psutil.virtual_memory().total, *(int(word) for word in limit if word.isdigit())])
    threads = torch.get_num_threads()
    text = f"{allowed} cores, {threads} threads, {memory / _GB:.1f} GB of memory"
    if threads > max(1, round(share)):
        found = f"{text}, but only {share:g} cores' worth of time: the threads wait for each other"
        return Finding("Processors", "note", found, f"Set OMP_NUM_THREADS={max(1, round(share))}.")
    if memory < _LITTLE:
        return Finding("Processors", "note", f"{text}: little", "Keep to --preset tiny, or a smaller --batch-size.")
    if threads < allowed // 2:
        return Finding("Processors", "note", f"{text}: OMP_NUM_THREADS or the like holds torch back")
    return Finding("Processors", "pass", text)


def _cgroup(name: str) -> list[str]:
    """The words of a file in which Linux limits a container; none where there is no such limit."""
    file = Path("/sys/fs/cgroup") / name
    return file.read_text().split() if file.is_file() else []


def precision() -> Finding:
    """A product in bf16 against one in fp32: whether it is right, and how fast; what --precision auto takes."""
    import torch

    from calotype import device as policy

    auto = str(policy.resolve_precision("auto")).removeprefix("torch.")
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(_SIDE, _SIDE, generator=generator).to(policy.device()) for _ in range(2))
    exact, slow = _timed(x, y)
    try:
        rough, quick = _timed(x.bfloat16(), y.bfloat16())
    except (RuntimeError, TypeError) as error:
        return Finding("Precision", "note", f"no bf16 here ({in_one_line(error)}); auto takes {auto}")
    error = float((rough.float() - exact).norm() / exact.norm())
    text = f"bf16 is off by {error:.1%} and takes {quick / slow:.2g} times as long as fp32; auto takes {auto}"
    if not error < _RIGHT:
        return Finding("Precision", "FAIL", text, "Give --precision fp32; this device multiplies wrongly in bf16.")
    if (auto == "bfloat16") != (quick < slow) and not 0.7 < quick / slow < 1.4:
        other = "fp32" if auto == "bfloat16" else "bf16"
        return Finding("Precision", "note", text, f"Try --precision {other} and compare the speed.")
    return Finding("Precision", "pass", text)


def _timed(x, y):
    """A product and the shortest of a few times (s) that it took."""
    import torch

    def once() -> float:
        began = time.perf_counter()
        (x @ y).sum().item()  # which waits for the device
        return time.perf_counter() - began

    product = (x @ y).float()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return product, min(once() for _ in range(_TRIES))


def weights() -> Iterator[Finding]:
    """Networks of others that some measures want: on disk or not. Nothing is fetched."""
    import torch
    from torchvision.models import Inception_V3_Weights, VGG16_Weights

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    files = {
        "lpips": folder / Path(VGG16_Weights.IMAGENET1K_V1.url).name,
        "inception": folder / Path(Inception_V3_Weights.IMAGENET1K_V1.url).name,
    }
    damaged = [file for file in files.values() if file.is_file() and not _is_whole(file)]
    if damaged:
        names = " ".join(map(str, damaged))
        yield Finding("Weights", "FAIL", f"damaged: {names}", f"Delete it; --allow-download fetches it again: {names}")
        return
    here = {name: file.is_file() for name, file in files.items()} | {"dinov2": _dinov2()}
    there, lacking = ([name for name, found in here.items() if found is wanted] for wanted in (True, False))
    text = f"on disk: {', '.join(there) or 'none'}; not there: {', '.join(lacking) or 'none'} (looked in {folder})"
    if lacking:
        need = "Needed for --perceptual lpips and --features inception or dinov2 alone; --allow-download fetches them."
        yield Finding("Weights", "note", text, need)
    else:
        yield Finding("Weights", "pass", text)


def _is_whole(file: Path) -> bool:
    """Whether a file of torchvision has the hash that its name ends in."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest().startswith(file.stem.rpartition("-")[2])


def _dinov2() -> bool:
    from huggingface_hub import try_to_load_from_cache

    from calotype.feature_files import DINOV2

    return isinstance(try_to_load_from_cache(DINOV2, "model.safetensors"), str)


if __name__ == "__main__":
    main()
