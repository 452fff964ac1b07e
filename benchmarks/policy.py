"""Is the form that `auto` gives a network the fastest one here?

    python -m benchmarks.policy
    python -m benchmarks.policy --preset base --side 16 --compile

Networks train and draw in every combination of precision, memory format, attention and way of enlarging; of each
situation the times of all and that of the form which the product takes by itself, over the fastest. `--compile` adds
drawing with compiled networks, which takes minutes.
"""

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from benchmarks.figures import Figure, conclude
from benchmarks.subjects import CLASSES
from benchmarks.timing import median, one_thread, take_turns
from calotype import device
from calotype.config import parse
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.models import build as build_autoencoder
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.models import Inputs, build
from calotype.upsampling import speed_up

NEAR = 1.2  # times that of the fastest, at most


class Cell(NamedTuple):
    """One form of a network."""

    precision: str  # fp32, bf16 (cast at each call) or weights in bf16
    last: bool  # channels last
    fused: bool  # attention
    transposed: bool  # enlarging in one transposed convolution
    trains: bool

    def __str__(self) -> str:
        """In words."""
        words = [self.precision, "channels last" if self.last else "", "fused attention" if self.fused else ""]
        return ", ".join(filter(None, [*words, "" if self.transposed else "stock enlarging"]))

    def of(self, network: nn.Module) -> nn.Module:
        """A copy of a network in this form."""
        ours = copy.deepcopy(network)
        for module in ours.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(AttnProcessor2_0() if self.fused else AttnProcessor())
        if self.transposed:
            speed_up(ours)
        for layer in ours.modules():
            if isinstance(layer, nn.Conv2d) and not self.trains:
                layer.requires_grad_(False)
        if self.precision == "weights in bf16":
            device._cast_once(ours)
        return ours.to(memory_format=torch.channels_last if self.last else torch.contiguous_format)


def main() -> int:
    """Print the tables; 1 if what is chosen is not near the fastest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=DiffusionSettings.PRESETS)
    parser.add_argument("--side", type=int, default=8, help="of the latents (4 channels)")
    parser.add_argument("--compile", action="store_true", help="compiled networks as well")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    one_thread()
    unet, vae = networks(args)
    figures = []
    for name, network, count, work in situations(unet, vae, args.side):
        trains = "train" in name
        recipes = {str(cell): work(cell.of(network), count, cell.precision) for cell in cells(network, trains)}
        ours = copy.deepcopy(network)
        if trains:
            device.for_training(ours)
        else:
            device.for_drawing(ours, "auto")
        recipes["auto"] = work(ours, count, "auto")
        if args.compile and not trains:
            frozen = copy.deepcopy(network)
            device.for_drawing(frozen, "auto", compiled=True)
            recipes["compiled"] = work(frozen, count, "auto")
        figures += compare(name, take_turns(recipes, args.rounds, warm_up=2))
    return conclude("policy", figures, vars(args))


def networks(args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """A UNet and an autoencoder of the preset, of random weights."""
    words = ["--preset", args.preset, "--out", "unused"]
    shape = (4, args.side, args.side)
    unet = build(parse(DiffusionSettings, ["--latents", "x", *words], "train-diffusion"), Inputs(shape, 0, CLASSES))
    settings = parse(VaeSettings, ["shapes", *words], "train-vae")
    side = settings.factor * args.side
    vae = build_autoencoder(settings, 3, (side, side)).vae
    return unet.to(device.device()), vae.to(device.device())


def cells(network: nn.Module, trains: bool) -> Iterator[Cell]:
    """The forms that differ for this network."""
    attends = any(hasattr(module, "set_processor") for module in network.modules())
    precisions = ("fp32", "bf16") if trains else ("fp32", "bf16", "weights in bf16")
    for values in itertools.product(precisions, (False, True), (False, True) if attends else (False,), (False, True)):
        yield Cell(*values, trains)


def situations(unet: nn.Module, vae: nn.Module, side: int) -> Iterator[tuple[str, nn.Module, int, Callable]]:
    """Name, network, batch, and what makes a recipe of a network in some form."""
    where = device.device()

    def z(count: int) -> torch.Tensor:
        return torch.randn(count, 4, side, side, device=where)

    def told(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((count,), 500.0, device=where), torch.arange(count, device=where) % CLASSES

    def training(network: nn.Module, count: int, precision: str) -> Callable[[], Any]:
        x, (t, y) = z(count), told(count)

        def work() -> None:
            with device.autocast(plain(precision)):
                out = network(x, t, class_labels=y).sample
            F.mse_loss(out.float(), x).backward()
            network.zero_grad()

        return work

    def drawing(network: nn.Module, count: int, precision: str) -> Callable[[], Any]:
        x, (t, y) = z(count), told(count)
        return under(precision, lambda: network(x, t, class_labels=y))

    def decoding(network: nn.Module, count: int, precision: str) -> Callable[[], Any]:
        x = z(count)
        return under(precision, lambda: network.decode(x))

    yield "UNet trains, batch 32", unet, 32, training
    yield "UNet draws, batch 1", unet, 1, drawing
    yield "UNet draws, batch 32", unet, 32, drawing
    yield "decoder, batch 1", vae, 1, decoding
    yield "decoder, batch 8", vae, 8, decoding


def under(precision: str, work: Callable[[], Any]) -> Callable[[], Any]:
    """A call in that precision without gradients."""

    def called() -> None:
        with torch.no_grad(), device.autocast(plain(precision)):
            work()

    return called


def plain(precision: str) -> str:
    """As `device.autocast` wants it."""
    return "bf16" if precision == "weights in bf16" else precision


def compare(name: str, found: dict[str, list[float]]) -> list[Figure]:
    """A row for each form, and one for the choice."""
    times = {cell: median(values) for cell, values in found.items()}
    best = min((cell for cell in times if cell not in ("auto", "compiled")), key=times.get)
    rows = [Figure(f"{name}: {cell}", 1000 * times[cell], "ms") for cell in sorted(times, key=times.get)]
    return [*rows, Figure(f"{name}: auto over {best}", times["auto"] / times[best], "x", NEAR, at_most=True)]


if __name__ == "__main__":
    sys.exit(main())
