"""`calotype tokens`: every picture as a grid of code numbers, for a model of sequences or any other use."""

import numpy as np
import torch
from diffusers import VQModel
from torch import Tensor

from calotype import device
from calotype.autoencoder import downsampling, pad
from calotype.data import Pictures
from calotype.errors import UserError
from calotype.sheet import summary
from calotype.stage1_vae.columns import (
    SPLITS,
    describe_pictures,
    measure_pictures,
    open_autoencoder,
    open_pictures,
    refuse_out,
    replacing,
    write_npz,
)
from calotype.stage1_vae.config import TokensSettings
from calotype.stage1_vae.gauges import CodeUse


def main(settings: TokensSettings) -> None:
    """Write the tokens, and print how much of the codebook they use."""
    refuse_out(settings.out, settings.fresh, (".npz",))
    vae = open_autoencoder(settings)
    if not isinstance(vae, VQModel):
        raise UserError(
            f"--vae {settings.vae} is an {type(vae).__name__}, which has no tokens; "
            "train one with --regularizer vq or fsq."
        )
    sheet = open_pictures(vae, settings)
    print(summary(sheet))
    with replacing(settings.out) as stream:
        tokens = np.concatenate([_tokens(vae, Pictures(sheet, split), split, settings) for split in SPLITS])
        codes = vae.config.num_vq_embeddings
        kept = tokens.astype(np.min_scalar_type(codes - 1))
        write_npz(stream, describe_pictures(sheet) | {"tokens": kept, "codebook_size": np.array(codes)})
    height, width = tokens.shape[1:]
    print(f"Wrote {height}x{width} tokens of {len(tokens):,} pictures to {settings.out}; {_use(tokens, codes)}.")


def token_numbers(vae: VQModel, x: Tensor) -> Tensor:
    """Numbers (B, h, w) of the codes that pictures x (B, C, H, W) in [-1, 1] become."""
    h = vae.encode(pad(x, downsampling(vae))).latents.float()
    with torch.autocast(h.device.type, enabled=False):  # near codes must not be confused by bf16
        numbers = [vae.quantize(part)[2][2] for part in h.split(_at_once(h, vae.config.num_vq_embeddings))]
    return torch.cat(numbers).reshape(len(h), *h.shape[2:])


def _at_once(h: Tensor, codes: int) -> int:
    """Pictures whose distances to every code fit into 256 MiB; at least one."""
    return max(1, 2**26 // (h[0, 0].numel() * codes))


def _tokens(vae: VQModel, pictures: Pictures, split: str, settings: TokensSettings) -> np.ndarray:
    def measure(x: Tensor) -> Tensor:
        with device.autocast(settings.precision):
            return token_numbers(vae, x)

    return measure_pictures(measure, pictures, range(len(pictures)), settings.batch_size, f"Encoding {split}")


def _use(tokens: np.ndarray, codes: int) -> str:
    gauge = CodeUse(codes)
    gauge.add(torch.from_numpy(tokens))
    figures = gauge.figures(gauge.total)
    return f"they use {figures['code_usage']:.1%} of {codes:,} codes, perplexity {figures['perplexity']:.1f}"
