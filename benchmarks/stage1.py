"""Is a step of stage 1 faster than the usual one? Ours and those of benchmarks/baselines.py, on the same networks.

    python -m benchmarks.stage1 --gan

Without --gan: error and KL. With it: the step once the decoder sees the discriminator, beside LPIPS with a VGG16 of
random weights (its speed does not depend on them) and without the gradient penalty, which the usual recipe lacks. All
recipes take turns in one process on one thread; what counts is CPU time, and ratios are those of neighbours.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from benchmarks.baselines import Plain, TwoPass
from benchmarks.figures import Figure, conclude, of_ratio
from benchmarks.timing import median, one_thread, take_turns, times_as_fast
from benchmarks.tiny import write_pictures
from calotype import cli
from calotype.config import parse
from calotype.data import Batch
from calotype.device import accelerator
from calotype.images import normalize
from calotype.sheet import read_sheet
from calotype.stage1_vae.config import VaeSettings
from calotype.stage1_vae.losses import l1
from calotype.stage1_vae.perceptual import Lpips
from calotype.stage1_vae.train import VaeStage

GOALS = {True: {"ours, fp32": 1.6, "ours, bf16": 2.6}, False: {}}  # times the speed of the usual recipe, by --gan
AGREE = 1e-4  # relative L2 distance of the gradients in fp32


def main() -> int:
    """Print a table; 1 if a figure misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gan", action="store_true", help="the adversarial step")
    parser.add_argument("--preset", default="small", choices=VaeSettings.PRESETS, help="gives the networks their size")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        sheet = make_sheet(Path(folder), args.image_size)
        lpips = random_lpips() if args.gan else None
        stages = {f"ours, {p}": make_stage(args, sheet, p, lpips) for p in ("fp32", "bf16")}
        batch = next(stages["ours, fp32"].batches(0))
    usual = make_usual(stages["ours, fp32"])
    apart = distance(stages["ours, fp32"], usual, batch)
    x, eps = inputs(stages["ours, fp32"], batch)
    recipes = {"usual, fp32": lambda: usual.step(x, eps)}
    recipes |= {name: lambda stage=stage: stage.step(batch, 1) for name, stage in stages.items()}
    return report(args, take_turns(recipes, args.rounds), apart)


def make_sheet(folder: Path, size: int) -> Path:
    """The data sheet of a few shapes of that side."""
    pictures = write_pictures(folder / "pictures", size)
    assert cli.main(["data", str(pictures), "--image-size", str(size), "--out", str(folder)]) == 0
    return folder / "data.json"


def random_lpips() -> Lpips:
    """LPIPS with a VGG16 of random weights."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    return Lpips(vgg16(weights=None).state_dict())


def make_stage(args, sheet: Path, precision: str, lpips: Lpips | None) -> VaeStage:
    """Stage 1 in that precision; with --gan its adversarial phase is well under way."""
    words = [str(sheet), "--preset", args.preset, "--batch-size", str(args.batch_size), "--learn-variance"]
    words += ["--precision", precision, "--out", "unused", "--lr", "1e-4"]
    if args.gan:
        words += "--adversarial 0.5 --adversarial-pretraining 0 --adversarial-cap 1e6 --r1 0".split()
    settings = parse(VaeSettings, words, "train-vae")
    stage = VaeStage(settings, read_sheet(sheet), accelerator(precision))
    if args.gan:
        stage.perceptual, stage.reconstruction = lpips, l1
        stage.adversary.state["began"] = 0
    return stage


def make_usual(stage: VaeStage) -> Plain | TwoPass:
    """The usual recipe with copies of a stage's networks."""
    vae, kl_weight = stock(stage.model.vae), stage.weights(1)["kl"] * stage.values
    if not stage.adversary:
        return Plain(vae, kl_weight)
    critic, weight = copy.deepcopy(stage.adversary.discriminator), stage.settings.adversarial
    return TwoPass(vae, critic, copy.deepcopy(stage.perceptual.whole), kl_weight, weight)


def stock(vae: AutoencoderKL) -> AutoencoderKL:
    """A copy with the weights of an autoencoder, computed as diffusers does."""
    fresh = AutoencoderKL.from_config(vae.config).to(vae.device)
    fresh.load_state_dict(vae.state_dict())
    return fresh


def inputs(stage: VaeStage, batch: Batch) -> tuple[Tensor, Tensor]:
    """Pictures (B, C, H, W) in [-1, 1] and the posterior's noise (B, c, h, w) that the stage takes for them."""
    return normalize(batch.x), stage._inputs(batch)[2]


def distance(stage: VaeStage, usual: Plain | TwoPass, batch: Batch) -> float:
    """The largest relative L2 distance of the gradients of one network in both recipes."""
    x, eps = inputs(stage, batch)
    stage.backward(batch, 1)
    pairs = [(stage.model.vae, usual.vae)]
    if stage.adversary:
        pairs.append((stage.adversary.discriminator, usual.critic))
        walks = [usual.of_autoencoder, usual.of_critic]
    else:
        walks = [usual.gradients]
    found = []
    for walk, pair in zip(walks, pairs, strict=True):
        walk(x, eps)
        ours, theirs = map(flat_gradient, pair)
        found.append(((ours - theirs).norm() / theirs.norm()).item())
    stage.forget()
    for _, network in pairs:
        network.zero_grad()
    return max(found)


def flat_gradient(network: nn.Module) -> Tensor:
    """All gradients of a network in a row."""
    return torch.cat([p.grad.flatten().double() for p in network.parameters()])


def report(args, found: dict[str, list[float]], apart: float) -> int:
    """Print the table and the JSON; 1 if a figure misses its goal."""
    usual, figures = found["usual, fp32"], []
    for name, values in found.items():
        how = f"{1000 * median(values):.0f} ms a step, {args.batch_size / median(values):.1f} images/s"
        figures.append(of_ratio(name, times_as_fast(usual, values), GOALS[args.gan].get(name), how))
    figures.append(Figure("gradients apart, fp32", apart, "relative L2", AGREE, at_most=True))
    return conclude("stage1 --gan" if args.gan else "stage1", figures, vars(args))


if __name__ == "__main__":
    sys.exit(main())
