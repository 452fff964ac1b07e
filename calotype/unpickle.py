"""The only place that opens a pickle: its tensors, by a process of their own that can do nothing else.

`torch.load` with `weights_only=True` runs in a child with three more locks: an audit hook under which it starts,
connects to and writes nothing but one file of tensors; limits of memory, time and file size; and an empty environment.
All the rest of the house reads that file.
"""

import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from calotype.errors import is_disk_full

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_REFUSED = 3  # the exit code of the child when a file holds more than weights
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP")  # for the child; no secret among them
_SECONDS = 3600


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle in memory; raises ValueError with what is wrong with it."""
    with tempfile.TemporaryDirectory(prefix="calotype-unpickle-", ignore_cleanup_errors=True) as temporary:
        target = Path(temporary) / "weights.safetensors"
        complaint = as_safetensors(file, target)
        if complaint:
            raise ValueError(complaint)
        return {name: tensor.clone() for name, tensor in load_file(target).items()}  # what was loaded is a view


def published(url: str, file: Path) -> dict[str, Tensor]:
    """Tensors of a pickle that torchvision publishes, fetched to `file` where it is not there, and checked by its hash.

    Raises OSError where it cannot be fetched and ValueError for one that is not what it should be.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        prefix = file.stem.rpartition("-")[2]  # of its SHA-256, by which torchvision names it
        try:
            torch.hub.download_url_to_file(url, str(file), prefix, progress=False)
        except RuntimeError as error:  # another hash than the name says
            raise ValueError(str(error)) from None
    return tensors_of(file)


def as_safetensors(file: Path, target: Path) -> str | None:
    """Write the tensors of a pickle to `target`; returns what is wrong with it, as the end of a sentence, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", "-c", _program(), str(file.resolve()), str(target)],
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {"OMP_NUM_THREADS": "1"},
            cwd=target.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"was not read within {_SECONDS // 60} minutes; fetch or copy it again."
    return _complaint(done.returncode, done.stderr) if done.returncode else None


def _program() -> str:
    """What the child runs: nothing of ours is imported there."""
    parts = [inspect.getsource(function) for function in (wanted, _limit, _lock, _unpickle)]
    return "\n".join([*parts, "import sys", "_unpickle(*sys.argv[1:])"])


def _complaint(code: int, stderr: str) -> str:
    """The child's end in words."""
    reason = "".join(letter for letter in (stderr.strip().splitlines() or ["no word"])[-1] if letter.isprintable())
    if code == _REFUSED:
        return f"holds more than weights ({reason}); where you trust it, save its state_dict alone and convert that."
    if is_disk_full(OSError(reason)):
        return "does not fit beside --out while it is read; free some space and give the same command again."
    if code < 0:
        return f"could not be read: the process was stopped by signal {-code}; it needs as much memory as the file has."
    return f"cannot be read as a checkpoint ({reason}); fetch or copy it again."


def wanted(names: list[str]) -> dict[str, str]:
    """Name in the file -> name in its autoencoder, without what a whole model and its training keep beside it."""
    prefixes = [start for start in ("first_stage_model.", "vae.") if any(name.startswith(start) for name in names)]
    prefix = prefixes[0] if prefixes else ""
    inner = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    beside = ("model.", "model_ema.", "cond_stage_model.", "conditioner.", "loss.")
    return {name: short for name, short in inner.items() if not short.startswith(beside)}


def _limit(source: str) -> None:
    """No more memory, time, or bytes in a file than the tensors of an honest one take; no picture of a crash."""
    import os

    try:
        import resource
    except ImportError:  # Windows has none of these
        return
    size = os.path.getsize(source)
    limits = {"RLIMIT_DATA": 3 * 2**30 + 6 * size, "RLIMIT_FSIZE": 2**26 + 4 * size, "RLIMIT_CORE": 0}
    limits["RLIMIT_CPU"] = 120 + size // 2**20
    for name, most in limits.items():
        if hasattr(resource, name):
            hard = resource.getrlimit(getattr(resource, name))[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(getattr(resource, name), (most, most))


def _lock() -> None:
    """From here on the process starts, connects to and writes nothing, and unpickles in no ordinary way."""
    import os
    import sys

    starts = ("os.system", "os.exec", "os.fork", "os.spawn", "os.posix_spawn", "subprocess.", "socket.", "ctypes.")
    changes = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")

    def guard(event: str, args: tuple) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event == "pickle.find_class" or event.startswith(starts) or event in changes:
            raise PermissionError(f"it tried {event}")

    sys.addaudithook(guard)


def _unpickle(source: str, target: str) -> None:
    """The child's work: tensors of a pickle to a safetensors file; it must stand alone, hence the imports."""
    import contextlib
    import re
    import sys
    import zipfile

    import torch
    from safetensors.torch import save_file

    _limit(source)
    _lock()
    zipped = zipfile.is_zipfile(source)
    try:
        with contextlib.suppress(Exception):  # Lightning notes the class of a callback; a class of no use stands for it
            names = torch.serialization.get_unsafe_globals_in_checkpoint(source) if zipped else []
            notes = [name for name in names if name.startswith(("pytorch_lightning.", "lightning."))]
            torch.serialization.add_safe_globals([(type("Note", (), {}), name) for name in notes])
        found = torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
        while isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
            found = found["state_dict"]
        if not isinstance(found, dict):
            raise TypeError(f"it is a {type(found).__name__}, not a table of tensors")
        tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
        names = wanted(list(tensors)).items()
        save_file({new: tensors[old].detach().clone().contiguous() for old, new in names}, target)
    except Exception as error:
        text = " ".join(str(error).split())
        more = re.search(r"GLOBAL (\S+) (?:was not|whose)|TorchScript|Can only (?:create|build)|Trying to call", text)
        sentence = re.split(r"(?<=\.) ", text.rpartition("Unpickler error: ")[2].partition(" Check the")[0])[0]
        print(more[1] or more[0] if more else f"{type(error).__name__}: {sentence[:120]}", file=sys.stderr)
        sys.exit(3 if more else 1)
