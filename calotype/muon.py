"""Muon: steps of equal size in every direction of a matrix (Jordan et al. 2024), AdamW for all that is no matrix."""

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd polynomial that drives singular values towards 1
_ITERATIONS = 5
_MOMENTUM = 0.95
_SIZE = 0.2  # root mean square of a step over the learning rate, as large as AdamW's (Liu et al. 2025)


class Muon(torch.optim.AdamW):
    """Muon in the groups that say `matrices`, where a kernel (out, in, h, w) counts as a matrix (out, in h w)."""

    def __init__(self, model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float):
        matrices, rest = split(model)
        groups = [{"params": matrices, "matrices": True}, {"params": rest, "matrices": False}]
        super().__init__([g | {"initial_lr": lr} for g in groups], lr, betas, weight_decay=weight_decay, foreach=False)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step; parameters without a gradient stay as they are."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["matrices"] else ():
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: nn.Parameter, group: dict) -> None:
        state, gradient = self.state[parameter], parameter.grad
        state["step"] = state.get("step", torch.zeros(())) + 1  # AdamW asks for it when a state is loaded
        momentum = state.setdefault("momentum", torch.zeros_like(gradient))
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        matrix = gradient.lerp(momentum, _MOMENTUM).flatten(1)  # Nesterov's
        size = _SIZE * max(matrix.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalized(matrix).view_as(parameter), alpha=-group["lr"] * size)


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained matrices and kernels between hidden layers, and all else: tables, biases, norms, first and last."""
    outside = {
        id(parameter)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] in ("conv_in", "conv_out")
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim > 1 and id(p) not in outside]
    chosen = set(map(id, matrices))
    return matrices, [p for p in trained if id(p) not in chosen]


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix (m, n) with singular values near 1 (0.7 to 1.2), by Newton-Schulz iterations in bf16."""
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)
