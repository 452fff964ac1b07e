"""A better start than random weights: initial conditions measured on real pictures."""

import torch
from torch import Tensor, nn

from calotype.randomness import key
from calotype.stage1_vae.models import Autoencoder
from calotype.stage1_vae.regularizers import FiniteScalar, VectorQuantization

_TAPS = {1: 3.0, 2: 1.5}  # by side of a map: sqrt(9 / taps of a 3x3 kernel that meet something)


@torch.no_grad()
def prepare(model: Autoencoder, x: Tensor, seed: int) -> None:
    """Fit the codes of a fresh autoencoder to pictures x (B, C, H, W); a resumed run overwrites them.

    A codebook begins at k-means centres of the codes, a grid with codes that are white; where a whole picture becomes a
    code of 1x1, the signal is carried through the smallest maps.
    """
    regularizer = model.regularizer
    deep = max(x.shape[2:]) <= model.factor
    if deep:
        carry_signal(model, x)
        spread(model.vae.quant_conv, _encode(model, x), model.vae.config.latent_channels)
    if isinstance(regularizer, FiniteScalar):
        regularizer.start_from(_encode(model, x))
    if isinstance(regularizer, VectorQuantization):
        regularizer.start_from(_encode(model, x), torch.Generator().manual_seed(key(seed, "codebook")))


@torch.no_grad()
def spread(conv: nn.Conv2d, h: Tensor, codes: int) -> None:
    """Rescale the 1x1 convolution that made h (B, c, h, w): its first `codes` channels get mean 0 and deviation 1.

    A fresh encoder's outputs are so narrow that a decoder hears nothing. Each channel by itself: a code may have more
    numbers than there are pictures here, and directions without any variance must not be blown up.
    """
    h = h[:, :codes]
    scale = 1 / h.std((0, 2, 3)).clamp_min(1e-6)
    conv.weight[:codes] *= scale[:, None, None, None]
    conv.bias[:codes] = (conv.bias[:codes] - h.mean((0, 2, 3))) * scale


@torch.no_grad()
def carry_signal(model: Autoencoder, x: Tensor) -> None:
    """Make up for the kernel taps that meet only the border of maps of 1x1 and 2x2, and drop the random biases.

    Otherwise each such layer shrinks what depends on the picture to a third, while its bias stays: six of them in a row
    leave a code that no gradient reaches. Measured on MNIST with 32 numbers, one minute: error 0.092 in place of 0.165.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    sides: dict[nn.Conv2d, int] = {}

    def note(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        sides[conv] = min(*output.shape[2:], *inputs[0].shape[2:])

    hooks = [conv.register_forward_hook(note) for conv in convolutions]
    h = model.encode(x[:1])
    model.decode(h[:, : model.vae.config.latent_channels], tuple(x.shape[2:]))
    for hook in hooks:
        hook.remove()
    for conv in convolutions:
        if conv.bias is not None:
            conv.bias.zero_()
        if conv.kernel_size == (3, 3):
            conv.weight *= _TAPS.get(sides[conv], 1.0)


def _encode(model: Autoencoder, x: Tensor) -> Tensor:
    return torch.cat([model.encode(part) for part in x.split(16)])
