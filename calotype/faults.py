"""Where NaN or Inf first came from: the step is taken once more, without changing anything, and watched."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


def locate(stage, step: int) -> str:
    """The start of a sentence that names the first module, or the first gradient, that was not finite at `step`."""
    found: list[str] = []
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
        return f"NaN or Inf at step {step} first came out of {found[0]}"
    if late:
        return f"NaN or Inf at step {step} came up in the backward pass, in the gradient of {late[0]}"
    return f"NaN or Inf at step {step} did not come back when the step was repeated"


def _watch(name: str, found: list[str]):
    """A hook that notes the module if its output is the first that is not finite; inner modules end before outer."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not found and not all(bool(tensor.isfinite().all()) for tensor in _tensors(output)):
            found.append(name)

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
