"""Autoencoders in latent-diffusion's naming: what the shapes say, and which tensors there must be.

So that none is missing, left over or of another shape without a word: diffusers' loader passes over all of that.
"""

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

GROUPS = 32  # of every GroupNorm in latent-diffusion; no tensor's shape tells it
WAY_OUT = "give a checkpoint of latent-diffusion's AutoencoderKL"

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Named = Iterator[tuple[str, Shape]]


class Unfit(ValueError):
    """What is wrong with the tensors of a file, in words that follow its name."""


class Layout(NamedTuple):
    """What the shapes of the tensors say about an autoencoder."""

    channels: int  # of a picture
    widths: tuple[int, ...]  # channels of the levels
    blocks: int  # residual blocks a level of the encoder; the decoder has one more
    latent: int  # channels of the latent
    middle: bool  # attention in the middle block
    attention: tuple[bool, ...]  # attention after every residual block of a level
    quant_conv: bool
    post_quant_conv: bool


def understand(shapes: Shapes) -> Layout:
    """The layout, after every tensor that it must have was found there in its shape; raises Unfit."""
    _refuse_other_kinds(shapes)
    layout = _layout(shapes)
    expected = dict(_tensors(layout))
    if missing := sorted(expected.keys() - shapes.keys()):
        raise Unfit(f"lacks {missing[0]}{_more(missing)}; {WAY_OUT}, all of it")
    if extra := sorted(shapes.keys() - expected.keys()):
        raise Unfit(f"holds {extra[0]}{_more(extra)}, which a stock AutoencoderKL has no place for; {WAY_OUT}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise Unfit(f"has {name} of {_by(shapes[name])}, not the {_by(shape)} that fits the others; {WAY_OUT}")
    return layout


def _refuse_other_kinds(shapes: Shapes) -> None:
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in shapes):
        raise Unfit("is the weights of a diffusers folder already; give that folder, with its config.json, itself")
    if any(name.startswith("quantize.") for name in shapes):
        raise Unfit(f"is a VQ autoencoder, which diffusers' loader cannot translate; {WAY_OUT}")
    if not any(name.startswith(("encoder.", "decoder.")) for name in shapes):
        raise Unfit(f"holds no autoencoder; {WAY_OUT}")


def _layout(shapes: Shapes) -> Layout:
    levels = range(max(1, _count(shapes, "encoder.down.{}.block.0.conv1.weight")))
    layout = Layout(
        channels=_side(shapes, "encoder.conv_in.weight", 1),
        widths=tuple(_side(shapes, f"encoder.down.{i}.block.0.conv1.weight", 0) for i in levels),
        blocks=_count(shapes, "encoder.down.0.block.{}.conv1.weight"),
        latent=_side(shapes, "decoder.conv_in.weight", 1),
        middle="encoder.mid.attn_1.q.weight" in shapes,
        attention=tuple(f"encoder.down.{i}.attn.0.q.weight" in shapes for i in levels),
        quant_conv="quant_conv.weight" in shapes,
        post_quant_conv="post_quant_conv.weight" in shapes,
    )
    if odd := [width for width in layout.widths if width % GROUPS]:
        raise Unfit(f"has a level of {odd[0]} channels, no multiple of {GROUPS}; {WAY_OUT}")
    embedding = _side(shapes, "post_quant_conv.weight", 1) if layout.post_quant_conv else layout.latent
    if embedding != layout.latent:
        sizes = f"embed_dim {embedding} and z_channels {layout.latent}"
        raise Unfit(f"has {sizes}, which are one number in a stock AutoencoderKL; {WAY_OUT} where they agree")
    return layout


def _tensors(layout: Layout) -> Named:
    """Name and shape of every tensor of such an autoencoder, in latent-diffusion's naming."""
    widths, top, z = layout.widths, layout.widths[-1], layout.latent
    yield from _conv("encoder.conv_in", layout.channels, widths[0])
    for i, (before, width) in enumerate(zip((widths[0], *widths), widths)):
        yield from _level(f"encoder.down.{i}", before, width, layout.blocks, layout.attention[i])
        if i < len(widths) - 1:
            yield from _conv(f"encoder.down.{i}.downsample.conv", width, width)
    yield from _middle("encoder.mid", top, layout.middle)
    yield from _ends("encoder", top, 2 * z)
    yield from _conv("decoder.conv_in", z, top)
    yield from _middle("decoder.mid", top, layout.middle)
    for i, (before, width) in enumerate(zip((*widths[1:], top), widths)):
        yield from _level(f"decoder.up.{i}", before, width, layout.blocks + 1, layout.attention[i])
        if i:
            yield from _conv(f"decoder.up.{i}.upsample.conv", width, width)
    yield from _ends("decoder", widths[0], layout.channels)
    if layout.quant_conv:
        yield from _conv("quant_conv", 2 * z, 2 * z, side=1)
    if layout.post_quant_conv:
        yield from _conv("post_quant_conv", z, z, side=1)


def _level(name: str, before: int, width: int, blocks: int, attention: bool) -> Named:
    for j in range(blocks):
        yield from _block(f"{name}.block.{j}", before if j == 0 else width, width)
        if attention:
            yield from _attention(f"{name}.attn.{j}", width)


def _middle(name: str, width: int, attention: bool) -> Named:
    yield from _block(f"{name}.block_1", width, width)
    if attention:
        yield from _attention(f"{name}.attn_1", width)
    yield from _block(f"{name}.block_2", width, width)


def _ends(name: str, width: int, channels: int) -> Named:
    yield from _norm(f"{name}.norm_out", width)
    yield from _conv(f"{name}.conv_out", width, channels)


def _block(name: str, before: int, width: int) -> Named:
    yield from _norm(f"{name}.norm1", before)
    yield from _conv(f"{name}.conv1", before, width)
    yield from _norm(f"{name}.norm2", width)
    yield from _conv(f"{name}.conv2", width, width)
    if before != width:
        yield from _conv(f"{name}.nin_shortcut", before, width, side=1)


def _attention(name: str, width: int) -> Named:
    yield from _norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.{part}", width, width, side=1)


def _conv(name: str, before: int, width: int, side: int = 3) -> Named:
    yield f"{name}.weight", (width, before, side, side)
    yield f"{name}.bias", (width,)


def _norm(name: str, width: int) -> Named:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _count(shapes: Shapes, pattern: str) -> int:
    """How many of `pattern` there are, numbered from 0."""
    return next(i for i in count() if pattern.format(i) not in shapes)


def _side(shapes: Shapes, name: str, axis: int) -> int:
    """One side of a 2D convolution's weight (out, in, height, width)."""
    if name not in shapes:
        raise Unfit(f"lacks {name}; {WAY_OUT}, all of it")
    if len(shapes[name]) != 4 or not all(shapes[name]):
        raise Unfit(f"has {name} of {_by(shapes[name])}, which is no 2D convolution; {WAY_OUT}")
    return shapes[name][axis]


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "one number"


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
