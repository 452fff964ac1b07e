"""Are generated `shapes` what they were asked to be? Judged by a small network that has only seen true pictures.

    python -m benchmarks.shapes_quality --samples DIR [--weights judge.safetensors]

DIR holds one folder a class ("red star" or "red_star") with pictures in it. The judge must choose one shape and one
colour for every picture, however poor; it was trained with slight blur, noise and changes of brightness, so that a soft
but right sample counts as right. The last line is the result as JSON.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from calotype.errors import UserError
from calotype.images import fit_image, load_image, normalize, to_uint8
from calotype.randomness import key
from calotype.shapes import CLASSES, COLOURS, FULL, PLAIN, SHAPES, draw_factors, render

SIZE = 32
VARIATIONS = {"plain": PLAIN, "full": FULL}
TRAIN_SEED, HELD_OUT_SEED = 1_000_001, 1_000_002
TRAIN_IMAGES, HELD_OUT_IMAGES, BATCH = 100 * len(CLASSES), 100 * len(CLASSES), 96


class Judge(nn.Module):
    """Logits of the shape (B, 6) and of the colour (B, 8) of pictures (B, 3, 32, 32) in [-1, 1]."""

    def __init__(self, width: int = 24):
        super().__init__()
        channels = [3, width, 2 * width, 4 * width, 4 * width]
        self.trunk = nn.Sequential(*(self._block(*pair) for pair in zip(channels, channels[1:])), nn.Flatten())
        self.shape = nn.Linear(4 * width * 4, len(SHAPES))
        self.colour = nn.Linear(4 * width * 4, len(COLOURS))

    @staticmethod
    def _block(before: int, after: int) -> nn.Sequential:
        conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two rows of logits."""
        features = self.trunk(x)
        return self.shape(features), self.colour(features)


def true_pictures(seed: int, count: int, variation: str) -> tuple[Tensor, Tensor]:
    """Rendered pictures (count, 3, 32, 32) in [-1, 1] and their classes."""
    factors = [draw_factors(seed, index, VARIATIONS[variation]) for index in range(count)]
    pixels = torch.stack([to_uint8(render(f, (SIZE, SIZE))) for f in factors])
    return normalize(pixels), torch.tensor([f.label for f in factors])


def soften(x: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures with a little blur (one strength a batch), and noise, brightness and contrast of their own."""
    blur = torch.rand((), generator=generator).item()
    if blur > 0.4:
        x = gaussian_blur(x, [5, 5], [blur])
    contrast, brightness, noise = torch.rand(3, len(x), 1, 1, 1, generator=generator)
    x = x * (0.9 + 0.15 * contrast) + 0.1 * (2 * brightness - 1)
    return (x + 0.12 * noise * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def loss_of(judge: Judge, x: Tensor, y: Tensor) -> Tensor:
    shape, colour = judge(x)
    return F.cross_entropy(shape, y % len(SHAPES)) + F.cross_entropy(colour, y // len(SHAPES))


def train(variation: str, epochs: int) -> Judge:
    x, y = true_pictures(TRAIN_SEED, TRAIN_IMAGES, variation)
    torch.manual_seed(key(TRAIN_SEED, "judge/weights"))
    generator = torch.Generator().manual_seed(key(TRAIN_SEED, "judge/batches"))
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), fused=True)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss_of(judge, soften(x[rows], generator), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


@torch.no_grad()
def classify(judge: Judge, x: Tensor) -> Tensor:
    """The classes (N,) that the judge sees."""
    logits = [judge(part) for part in x.split(500)]
    return torch.cat([colour.argmax(1) * len(SHAPES) + shape.argmax(1) for shape, colour in logits])


def score(seen: Tensor, wanted: Tensor) -> dict[str, float]:
    """Shares in [0, 1]: shape right, colour right, both right."""
    shape, colour = (seen - wanted) % len(SHAPES) == 0, seen // len(SHAPES) == wanted // len(SHAPES)
    right = {"shape": shape, "colour": colour, "both": shape & colour}
    return {name: round(hits.double().mean().item(), 4) for name, hits in right.items()}


def held_out_scores(judge: Judge, variation: str) -> dict[str, dict[str, float]]:
    """The judge's own scores on true pictures that it has not seen, as they are and softened."""
    x, y = true_pictures(HELD_OUT_SEED, HELD_OUT_IMAGES, variation)
    generator = torch.Generator().manual_seed(key(HELD_OUT_SEED, "judge/soften"))
    soft = torch.cat([soften(part, generator) for part in x.split(BATCH)])
    return {"held_out": score(classify(judge, x), y), "held_out_soft": score(classify(judge, soft), y)}


def make_judge(weights: Path | None, variation: str, epochs: int) -> Judge:
    """A judge from `weights` if that file exists; else a newly trained one, kept there."""
    if weights and weights.exists():
        judge = Judge()
        judge.load_state_dict(load_file(weights))
        return judge.eval()
    start = time.perf_counter()
    judge = train(variation, epochs)
    print(f"judge trained in {time.perf_counter() - start:.0f} s")
    if weights:
        save_file(judge.state_dict(), weights)
    return judge


def read_samples(folder: Path) -> tuple[Tensor, Tensor]:
    """The pictures (N, 3, 32, 32) in [-1, 1] under DIR/<class>/ and the classes that were asked for."""
    pictures, wanted = [], []
    for path in sorted(folder.glob("*/*.png")):
        name = path.parent.name.replace("_", " ")
        if name not in CLASSES:
            raise UserError(f'--samples: the folder "{path.parent}" is no class; name it like "red star"')
        image = fit_image(load_image(path, channels=3), (SIZE, SIZE), "stretch")
        pictures.append(normalize(to_uint8(image)))
        wanted.append(CLASSES.index(name))
    if not pictures:
        raise UserError(f"--samples {folder}: no DIR/<class>/*.png found")
    return torch.stack(pictures), torch.tensor(wanted)


def print_table(seen: Tensor, wanted: Tensor, held_out: dict[str, dict[str, float]]) -> None:
    table = Table("pictures", "n", "shape right", "colour right", "both right")

    def row(name: str, n: int, scores: dict[str, float]) -> None:
        table.add_row(name, str(n), *(f"{100 * scores[part]:.1f} %" for part in ("shape", "colour", "both")))

    for kind, names, group in (("colour", COLOURS, wanted // len(SHAPES)), ("shape", SHAPES, wanted % len(SHAPES))):
        for i, name in enumerate(names):
            if (group == i).any():
                row(f"{kind} {name}", int((group == i).sum()), score(seen[group == i], wanted[group == i]))
        table.add_section()
    row("all samples", len(seen), score(seen, wanted))
    row("true, held out", HELD_OUT_IMAGES, held_out["held_out"])
    row("true, held out, softened", HELD_OUT_IMAGES, held_out["held_out_soft"])
    Console().print(table)


def judge_samples(folder: Path, weights: Path | None, variation: str, epochs: int) -> None:
    x, wanted = read_samples(folder)
    judge = make_judge(weights, variation, epochs)
    held_out = held_out_scores(judge, variation)
    if held_out["held_out"]["both"] < 0.99:
        right = f"right about only {held_out['held_out']['both']:.1%} of true pictures"
        raise UserError(f"--weights {weights}: this judge is {right}; delete the file, or raise --epochs {epochs}")
    seen = classify(judge, x)
    print_table(seen, wanted, held_out)
    print(json.dumps({"n": len(seen), **score(seen, wanted), **held_out, "variation": variation}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=Path, required=True, help="folder of class folders of PNG files")
    parser.add_argument("--weights", type=Path, help="the judge's safetensors: read if there, else written")
    parser.add_argument("--variation", choices=VARIATIONS, default="plain", help="which true pictures the judge learns")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    try:
        judge_samples(options.samples, options.weights, options.variation, options.epochs)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
