"""`calotype convert`: the autoencoder of a latent-diffusion checkpoint as a stock diffusers folder.

A pickle is opened by `calotype.unpickle` alone, in a process that can do nothing else. `ldm_layout` says which tensors
there must be; diffusers' own loader translates their names.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from calotype import unpickle
from calotype.checkpoint import load_module, publish
from calotype.errors import UserError
from calotype.stage1_vae.config import ConvertSettings
from calotype.stage1_vae.ldm_layout import GROUPS, WAY_OUT, Layout, Unfit, understand

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def main(settings: ConvertSettings) -> None:
    """Write --out whole, or refuse in one line and leave nothing."""
    out = settings.out.resolve()
    _refuse_early(settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary)
        layout, weights = _read(settings.file, _as_safetensors(settings.file, folder))
        _refuse_size(settings.image_size, layout)
        vae = build(layout, weights, settings.image_size, folder)
        vae.save_pretrained(folder / "vae", safe_serialization=True)
        publish(folder / "vae", out)
    factor = 2 ** (len(layout.widths) - 1)
    print(f"Autoencoder: {settings.out}, {layout.latent} latent channels at 1/{factor} of the side.")


def _refuse_early(settings: ConvertSettings) -> None:
    file, out = settings.file, settings.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not empty; give another.")
    if file.is_dir():
        raise UserError(f"FILE {file} is a folder; if diffusers saved it, give it to --init or --vae as it is.")
    if not file.is_file():
        raise UserError(f"FILE {file} is not there; give a checkpoint ({' '.join(unpickle.SUFFIXES)} .safetensors).")
    if file.suffix.lower() not in (*unpickle.SUFFIXES, ".safetensors"):
        raise UserError(
            f"FILE {file} must end in {', '.join(unpickle.SUFFIXES)} or .safetensors; rename it if it is one."
        )


def _refuse_size(size: int, layout: Layout) -> None:
    factor = 2 ** (len(layout.widths) - 1)
    if size % factor:
        near = max(factor, size // factor * factor)
        raise UserError(f"--image-size {size} must be a multiple of {factor}, picture side by latent side; try {near}.")


# ---- reading


def _as_safetensors(file: Path, folder: Path) -> Path:
    """The file itself, or its tensors written to `folder` by a process that can do nothing else."""
    if file.suffix.lower() == ".safetensors":
        return file
    target = folder / "weights.safetensors"
    complaint = unpickle.as_safetensors(file, target)
    if complaint:
        raise UserError(f"FILE {file} {complaint}")
    return target


def _read(file: Path, readable: Path) -> tuple[Layout, dict[str, Tensor]]:
    """Layout and float32 tensors of the autoencoder in a safetensors file; raises UserError naming `file`."""
    try:
        with safe_open(readable, "pt") as tensors:
            names = {short: name for name, short in unpickle.wanted(list(tensors.keys())).items()}
            layout = understand({short: tuple(tensors.get_slice(name).get_shape()) for short, name in names.items()})
            return layout, {short: _float(tensors.get_tensor(name), short) for short, name in names.items()}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"FILE {file} cannot be read as a checkpoint ({reason}); fetch or copy it again.") from None
    except Unfit as error:
        raise UserError(f"FILE {file} {error}.") from None


def _float(tensor: Tensor, name: str) -> Tensor:
    found = tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else None
    if found is None or not found.isfinite().all():
        what = f"is of {tensor.dtype}" if found is None else "holds values that are not finite"
        raise Unfit(f"is of no use: {name} {what}; {WAY_OUT} in floating point")
    return found


# ---- building


def build(layout: Layout, weights: dict[str, Tensor], image_size: int, folder: Path) -> AutoencoderKL:
    """The stock autoencoder of these tensors, translated by diffusers' loader; `folder` is scratch space."""
    (folder / "config.json").write_text(json.dumps(_config(layout, image_size)))
    known = {name: tensor for name, tensor in weights.items() if ".attn." not in name}
    vae = AutoencoderKL.from_single_file(known, config=str(folder), local_files_only=True, low_cpu_mem_usage=False)
    _load_level_attention(vae, layout, weights)
    # A loader that passed over a tensor would leave random numbers in its place.
    assert _extremes(vae.state_dict()) == _extremes(weights)
    return vae


def _config(layout: Layout, image_size: int) -> dict[str, Any]:
    """Settings of a stock AutoencoderKL, not latent-diffusion's: the loader reads no switch for attention in those."""
    attention = ["Attn" if present else "" for present in layout.attention]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": layout.channels,
        "out_channels": layout.channels,
        "down_block_types": [f"{prefix}DownEncoderBlock2D" for prefix in attention],
        "up_block_types": [f"{prefix}UpDecoderBlock2D" for prefix in reversed(attention)],
        "block_out_channels": layout.widths,
        "layers_per_block": layout.blocks,
        "latent_channels": layout.latent,
        "norm_num_groups": GROUPS,
        "sample_size": image_size,
        "force_upcast": False,
        "use_quant_conv": layout.quant_conv,
        "use_post_quant_conv": layout.post_quant_conv,
        "mid_block_add_attention": layout.middle,
    }


def _load_level_attention(vae: AutoencoderKL, layout: Layout, weights: dict[str, Tensor]) -> None:
    """Attention outside the middle, which diffusers' loader does not know."""
    for i in (i for i, present in enumerate(layout.attention) if present):
        blocks = {f"encoder.down.{i}": vae.encoder.down_blocks[i], f"decoder.up.{i}": vae.decoder.up_blocks[-1 - i]}
        for name, block in blocks.items():
            for j, attention in enumerate(block.attentions):
                _load_attention(attention, f"{name}.attn.{j}", weights)


def _load_attention(attention: nn.Module, name: str, weights: dict[str, Tensor]) -> None:
    found: dict[str, Tensor] = {}
    for theirs, ours in _ATTENTION.items():
        weight = weights[f"{name}.{theirs}.weight"]
        found[f"{ours}.weight"] = weight[:, :, 0, 0] if weight.ndim == 4 else weight  # 1x1 convolutions are linear
        found[f"{ours}.bias"] = weights[f"{name}.{theirs}.bias"]
    load_module(attention, found)


def _extremes(tensors: dict[str, Tensor]) -> list[tuple[int, float, float]]:
    """What no translation of names changes: size, least and greatest value of every tensor."""
    return sorted((tensor.numel(), tensor.min().item(), tensor.max().item()) for tensor in tensors.values())
