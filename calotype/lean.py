"""A quick start for commands that draw: what diffusers imports without need is put off, or left out.

To load one network, diffusers imports torch._dynamo with sympy, transformers, scipy.stats, and some seventy networks
beside it: more than half of the time from the start of a process to its first picture. A package whose turn has not
come is put off by a module that holds nothing and becomes the real one as soon as it is asked for a name (PEP 562), so
nothing is lost. Only transformers is left out altogether, as if it were not installed, where no model is told text.
"""

import gc
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial, wraps
from pathlib import Path
from types import ModuleType

_UNASKED = (
    "scipy.stats",
    "scipy.integrate",
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
)
_MOST_INDEX = 1_000_000  # bytes of a model's index that are looked at
_TURN = threading.RLock()
_RUN: set[str] = set()  # of the modules that were put off, those whose turn has come


def import_diffusers(models: Iterable[Path]) -> None:
    """Import diffusers for drawing with these model or run folders, where it is not imported yet.

    For processes of our own alone: where none of the models is told text, diffusers has no text pipelines afterwards.
    """
    if "diffusers" in sys.modules:
        return
    gc.disable()  # next to nothing of what is imported ever becomes garbage, and it is searched again and again
    import torch

    hidden = ["torch._dynamo"] if any(map(_is_told_text, models)) else ["torch._dynamo", "transformers"]
    with _absent(*hidden), _compiler_later(torch):
        for name in _UNASKED:
            put_off(name)
        _ask_no_compiler(importlib.import_module("diffusers.utils.torch_utils"))
        importlib.import_module("diffusers.pipelines.pipeline_utils")
    gc.freeze()
    gc.enable()


def put_off(name: str) -> None:
    """Put the code of a module or package off until somebody asks it for a name; its submodules come in without it."""
    if name in sys.modules:
        return
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of what it lies in
        return
    if spec is not None:
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
        module.__getattr__ = lambda wanted: _ask(module, wanted)


def _ask(module: ModuleType, wanted: str):
    """A name of a module that was put off: its code runs now, unless it does or did already."""
    with _TURN:
        if not wanted.startswith("__") and module.__name__ not in _RUN:  # the import system asks for the others itself
            _RUN.add(module.__name__)
            module.__spec__.loader.exec_module(module)
    if wanted not in vars(module):
        raise AttributeError(f"module {module.__name__!r} has no attribute {wanted!r}")
    return vars(module)[wanted]


@contextmanager
def _absent(*names: str) -> Iterator[None]:
    """While these modules cannot be imported: whoever can do without them does."""
    names = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


@contextmanager
def _compiler_later(torch: ModuleType) -> Iterator[None]:
    """While `torch.compiler.disable` does not import the compiler to tell it to leave a function alone."""
    at_once, torch.compiler.disable = torch.compiler.disable, partial(_disable_later, torch.compiler.disable)
    try:
        yield
    finally:
        torch.compiler.disable = at_once


def _disable_later(disable: Callable, function: Callable | None = None, *args, **more) -> Callable:
    """What `disable` makes of a function, from the first call on at which there is a compiler; until then the function.

    diffusers decorates with it what offloading calls, and the progress bar.
    """
    if function is None:
        return lambda function: _disable_later(disable, function, *args, **more)
    disabled = cache(lambda: disable(function, *args, **more))

    @wraps(function)
    def call(*given, **named):
        return (disabled() if _has_compiler() else function)(*given, **named)

    return call


def _has_compiler() -> bool:
    return bool(sys.modules.get("torch._dynamo"))


def _ask_no_compiler(torch_utils: ModuleType) -> None:
    """No network is compiled as long as nobody has imported the compiler; diffusers would import it to see."""
    is_compiled = torch_utils.is_compiled_module
    torch_utils.is_compiled_module = lambda network: _has_compiler() and is_compiled(network)


def _is_told_text(model: Path) -> bool:
    """Whether a part of the model comes from transformers, as far as can be seen without loading it."""
    for folder in (model, model / "pipeline"):
        with suppress(OSError), (folder / "model_index.json").open("rb") as file:
            return b'"transformers"' in file.read(_MOST_INDEX)
    return False
