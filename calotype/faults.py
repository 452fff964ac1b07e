"""Where NaN or Inf first came from: the step is taken once more, without changing anything, and watched."""

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calotype.data import Batch, PictureBatches
from calotype.stage import Stage

_NAMED = 3  # examples that are named one by one


class Found(NamedTuple):
    """A module whose output was not finite, and the rows of it that were not."""

    module: str
    rows: list[int]
    of: int


def locate(stage: Stage, step: int) -> str:
    """The start of a sentence: the first module, or gradient, that was not finite at `step`, and which examples."""
    found: list[Found] = []
    late: list[str] = []
    batch = next(stage.batches(step))
    with ExitStack() as hooks:
        for model_name, model in stage.models.items():
            for name, module in model.named_modules():
                watch = _watch(f"{model_name}.{name}" if name else model_name, found)
                hooks.callback(module.register_forward_hook(watch).remove)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    watch = _watch_gradient(f"{model_name}.{name}", late)
                    hooks.callback(parameter.register_post_accumulate_grad_hook(watch).remove)
        stage.backward(batch, step)
    if not late and (gradient := _gradient(stage.models)):  # another process's fault, which came with averaging
        late.append(gradient)
    stage.forget()
    if found:
        return f"NaN or Inf at step {step} first came out of {found[0].module} ({_examples(stage, batch, found[0])})"
    if late:
        where = f"in the gradient of {late[0]} ({_examples(stage, batch)})"
        return f"NaN or Inf at step {step} came up in the backward pass, {where}"
    return f"NaN or Inf at step {step} did not come back when the step was repeated"


def _examples(stage: Stage, batch: Batch, found: Found | None = None) -> str:
    """The examples that may be at fault, by position; a few of them by the name of their picture or latent too."""
    size = len(batch.x)
    if found is None or found.of != size or len(found.rows) == size:  # one of several parts, or all of them
        return f"examples {batch.start} to {batch.start + size - 1}"
    names = [_name(stage, batch, row) for row in found.rows[:_NAMED]]
    more = len(found.rows) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _name(stage: Stage, batch: Batch, row: int) -> str:
    source, position = getattr(stage, "batch_source", None), batch.start + row
    if isinstance(source, PictureBatches):
        return f"example {position}, {source.pictures.records[source.order.index(position)].file}"
    return f"example {position}" if batch.item is None else f"example {position}, latent {int(batch.item[row])}"


def _watch(name: str, found: list[Found]):
    """A hook that notes the module if its output is the first that is not finite; inner modules end before outer."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        for tensor in _tensors(output) if not found else ():
            bad = ~tensor.isfinite()
            if bad.any():
                rows = bad.flatten(1).any(1) if bad.ndim > 1 else bad.reshape(-1)
                found.append(Found(name, rows.nonzero().flatten().tolist(), len(rows)))
                return

    return hook


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a module's output, whatever it is wrapped in."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in _tensors(item)]
    return []


def _watch_gradient(name: str, late: list[str]):
    """A hook that notes a parameter whose gradient is not finite; the nearest to the loss gets its own first."""

    def hook(parameter: nn.Parameter) -> None:
        if not late and not bool(parameter.grad.isfinite().all()):
            late.append(name)

    return hook


def _gradient(models: dict[str, nn.Module]) -> str | None:
    """The name of the last parameter whose gradient is not finite."""
    named = [(f"{m}.{name}", p.grad) for m, model in models.items() for name, p in model.named_parameters()]
    bad = [name for name, gradient in named if gradient is not None and not torch.isfinite(gradient).all()]
    return bad[-1] if bad else None
