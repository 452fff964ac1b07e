"""Nearest enlargement and the 3x3 convolution after it, as one transposed convolution: the same for half the work.

A pixel of the doubled picture sees only 2x2 different ones of the small picture, so of nine products four are enough
once the kernel's rows and columns that meet the same pixel are added up. The networks stay diffusers' own: weights,
names and configs are untouched, and what is saved is what any other program reads.
"""

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

_FEWEST_TRAINED, _FEWEST_FROZEN = 1024, 512  # pixels of a batch from which on it pays (measured on a CPU)
# Row k of a 4x4 kernel with stride 2 is the sum of those rows of the 3x3 kernel that meet the same small pixel.
_ROWS = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def transposed_kernel(weight: Tensor) -> Tensor:
    """The (in, out, 4, 4) kernel of the transposed convolution (stride 2, padding 1) that also enlarges.

    `weight` (out, in, 3, 3) is that of the convolution with padding 1 after nearest enlargement.
    """
    rows = _ROWS.to(weight)
    return torch.einsum("oiyx,ay,bx->ioab", weight, rows, rows)


class TransposedUpsample2D(Upsample2D):
    """diffusers' Upsample2D, computed as one transposed convolution where that pays."""

    def forward(self, hidden_states: Tensor, output_size=None, *args, **kwargs) -> Tensor:
        """Activations (B, C, h, w) -> (B, C', 2h, 2w)."""
        if output_size is None and _pays(hidden_states, self.conv):
            return enlarged(hidden_states, self.conv)
        return super().forward(hidden_states, output_size)  # also for sides that were odd before they were halved


class Enlarge(nn.Conv2d):
    """The convolution after an nn.Upsample, with the enlargement in it."""

    def forward(self, x: Tensor) -> Tensor:
        """Activations (B, C, h, w) -> (B, C', 2h, 2w)."""
        if _pays(x, self):
            return enlarged(x, self)
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def enlarged(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What a convolution makes of x (B, C, h, w), enlarged to twice its sides: (B, C', 2h, 2w)."""
    return F.conv_transpose2d(x, _kernel(conv, x.device.type), conv.bias, stride=2, padding=1)


def _pays(x: Tensor, conv: nn.Conv2d) -> bool:
    """With few pixels the kernel costs more than it saves, sooner where it is made anew at each call."""
    fewest = _FEWEST_TRAINED if conv.weight.requires_grad else _FEWEST_FROZEN
    return x.shape[0] * x.shape[2] * x.shape[3] >= fewest


def _kernel(conv: nn.Conv2d, device: str) -> Tensor:
    """The kernel; of frozen weights it is kept from call to call, in the precision that multiplies.

    Not so where weights are trained: a fused optimiser changes them without raising their version.
    """
    weight = conv.weight
    if weight.requires_grad or weight.is_inference() or torch.compiler.is_compiling():
        return transposed_kernel(weight)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    made_of = (weight.data_ptr(), weight._version, dtype)
    kept = conv.__dict__.get("_kept_kernel")
    if kept is None or kept[0] != made_of:
        kept = conv.__dict__["_kept_kernel"] = (made_of, transposed_kernel(weight.float()).to(dtype))
    return kept[1]


def speed_up(network: nn.Module) -> None:
    """Compute all enlargements in a network that way; what computes them otherwise stays as it is."""
    for module in network.modules():
        if type(module) is Upsample2D and _fits(module):
            module.__class__ = TransposedUpsample2D
        elif isinstance(module, nn.Sequential):
            _join_pairs(module)


def _fits(module: Upsample2D) -> bool:
    conv = module.conv if module.name == "conv" and module.use_conv and not module.use_conv_transpose else None
    return module.norm is None and module.interpolate and _is_plain(conv)


def _is_plain(conv: nn.Module | None) -> bool:
    usual = {"kernel_size": (3, 3), "padding": (1, 1), "stride": (1, 1), "dilation": (1, 1), "groups": 1}
    return type(conv) is nn.Conv2d and all(getattr(conv, name) == value for name, value in usual.items())


def _join_pairs(layers: nn.Sequential) -> None:
    """An nn.Upsample and the convolution behind it, as in AutoencoderTiny's decoder."""
    for i in range(len(layers) - 1):
        up, conv = layers[i], layers[i + 1]
        if isinstance(up, nn.Upsample) and up.scale_factor == 2 and up.mode == "nearest" and _is_plain(conv):
            layers[i], conv.__class__ = nn.Identity(), Enlarge
