"""One device policy: which device, precision, attention and memory format, and what is compiled."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from calotype.errors import UserError
from calotype.upsampling import speed_up

_WIDE = 64  # channels of an autoencoder's first level, from which on channels last is a tenth faster on a CPU too


def accelerator(precision: str, *, trackers: tuple[str, ...] = (), folder=None) -> Accelerator:
    """An Accelerator on the best device here; `precision` is auto, fp32 or bf16."""
    _refuse_missing_trackers(trackers)
    AcceleratorState._reset_state(reset_partial_state=False)  # a process may run several commands, one after the other
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if cpu and "RANK" in os.environ:  # accelerate starts a single process unless it is told
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    return Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if resolve_precision(precision) == torch.bfloat16 else "no",
        log_with=list(trackers) or None,
        project_dir=folder,
    )


def _refuse_missing_trackers(trackers: tuple[str, ...]) -> None:
    """accelerate drops a tracker that is not installed with a line in the debug log; a user wants to know."""
    here = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in trackers:
        if name not in here:
            known = f"here are {', '.join(sorted(here))}" if here else "none is installed"
            raise UserError(f"--trackers {name} is not to be had ({known}); try pip install 'calotype[track]'.")


def leave(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end the process with its exit code, also as one of several.

    There the process group's threads may abort an interpreter that shuts down in the ordinary way, after all is done
    ("terminate called without an active exception"), and a launcher would take the run for failed.
    """
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    if "RANK" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def device() -> torch.device:
    """CUDA, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_precision(precision: str) -> torch.dtype:
    """`auto` is bf16 where the hardware multiplies in it, fp32 elsewhere; UserError if bf16 cannot be had."""
    if precision == "auto":
        return torch.bfloat16 if _fast_bf16() else torch.float32
    if precision == "bf16" and device().type == "mps":
        raise UserError("--precision bf16 is not supported on this device; give --precision fp32.")
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def autocast(precision: str) -> torch.autocast:
    """A context in which inference runs in that precision."""
    dtype = resolve_precision(precision)
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def for_training(model: nn.Module, *parts: nn.Module, compiled: bool = False) -> None:
    """Give a network the form in which it trains fastest here; `parts` are what is compiled where that is asked for.

    Raises UserError where nothing can be compiled. `python -m benchmarks.policy` measures what is decided here.
    """
    _choose_attention(model)
    _speed_up_upsampling(model)
    model.to(memory_format=_memory_format())
    for part in parts if compiled else ():
        compile_by(part)


def for_drawing(model: nn.Module, precision: str = "fp32", *, compiled: bool = False) -> None:
    """Give a network the form in which it draws, encodes or decodes fastest here; raises UserError as above.

    In bf16 it is for use under `autocast`, of whose results no bit changes: what that casts at each call is cast once.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):  # of linear layers torch multiplies frozen ones in a slower way
            layer.requires_grad_(False)
    _choose_attention(model)
    _speed_up_upsampling(model)
    half = resolve_precision(precision) == torch.bfloat16
    if half:
        _cast_once(model)
    wide = half and getattr(model, "decoder", None) is not None and model.config.block_out_channels[0] >= _WIDE
    model.to(memory_format=torch.channels_last if wide else _memory_format())
    if compiled:
        compile_by(model, freezing=device().type == "cpu")


def _cast_once(model: nn.Module) -> None:
    """Bring to bf16 what autocast would at each call; but for the first layer, whose dtype diffusers takes for all."""
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer in layers[1:]:
        layer.to(torch.bfloat16)


def compile_by(part: nn.Module, **options: bool) -> None:
    """Compile a network at its first call, which takes minutes; what comes of it is kept for the next process.

    On a CPU a step of training gains nothing by it, drawing a single picture with frozen weights half its time.
    """
    _refuse_without_compiler()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "calotype" / "compiled"))
    part.compile(options=options or None)


def _refuse_without_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError("--compile needs a C++ compiler and finds none; install g++, or leave the flag out.") from None
    if device().type == "cuda" and not has_triton():
        raise UserError("--compile needs triton on this GPU; pip install triton, or leave the flag out.")


def _memory_format() -> torch.memory_format:
    """Channels last is what a GPU's convolutions want; on a CPU group normalisation loses more than they gain."""
    return torch.channels_last if device().type == "cuda" else torch.preserve_format


def _choose_attention(model: nn.Module) -> None:
    """On a CPU softmax(QK)V by hand: torch's fused kernel is 1.3 to 9 times slower there for up to 1,024 tokens."""
    if device().type == "cpu":
        for module in model.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(AttnProcessor())


def _speed_up_upsampling(model: nn.Module) -> None:
    """Two to four times as fast on a CPU; elsewhere nobody has measured it yet."""
    if device().type == "cpu":
        speed_up(model)


def _fast_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    return device().type == "cpu" and torch.cpu._is_avx512_bf16_supported()
