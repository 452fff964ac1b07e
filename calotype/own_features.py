"""A feature network of the user's own pictures: small, trained in half a minute, and kept for the next time.

With classes it learns to tell them apart, and its last layer judges labelled samples. Without, it learns that two views
of a picture belong together and different pictures do not (Barlow Twins, Zbontar et al. 2021).
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calotype import device
from calotype.checkpoint import publish, weights_hash
from calotype.data import Pictures, evenly_spaced
from calotype.features import FeatureNetwork
from calotype.images import normalize
from calotype.randomness import KeyedOrder, key, normal, uniform
from calotype.sheet import Sheet
from calotype.weights import refuse_non_finite

VERSION = 2
FEATURES = 128
_SIDES = 32, 64  # up to the first a picture is taken whole, beyond the second it is made smaller
_STEPS, _EPOCHS, _BATCH, _WIDTH = 200, 40, 96, 24
_PEAK_LR = 4e-3
_OFF_DIAGONAL = 0.01
_JUDGED = 2000  # held-out pictures at most that it is tested on


class OwnNetwork(nn.Module):
    """Four convolutions down to 128 features (B, 128), and a layer on top (B, outputs)."""

    def __init__(self, channels: int, outputs: int, stride: int = 1):
        super().__init__()
        widths = [channels, _WIDTH, 2 * _WIDTH, 4 * _WIDTH, FEATURES]
        strides = [stride, 1, 1, 1]
        self.trunk = nn.Sequential(*(self._block(*each) for each in zip(widths, widths[1:], strides)))
        # The kernel distance depends on the scale: large features make it a matter of a few outliers.
        self.standard = nn.BatchNorm1d(FEATURES, affine=False)
        self.head = nn.Linear(FEATURES, outputs)

    @staticmethod
    def _block(before: int, after: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True))

    def features(self, x: Tensor) -> Tensor:
        """Features (B, 128) of pictures (B, C, H, W) in [-1, 1]."""
        return self.standard(self.trunk(shrunk(x)).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of classes, or the projection that two views must share (B, outputs)."""
        return self.head(self.features(x))


class Own(NamedTuple):
    """The network of a data sheet; `classes` is empty where it was trained without."""

    net: OwnNetwork
    network: FeatureNetwork
    classes: list[str]

    @torch.no_grad()
    def classify(self, pictures: Iterator[Tensor]) -> Tensor:
        """Class ids (n,) that it sees in batches of uint8 pictures (B, C, H, W)."""
        where = next(self.net.parameters()).device
        return torch.cat([self.net(normalize(x.to(where))).argmax(1).cpu() for x in pictures])


def shrunk(x: Tensor) -> Tensor:
    """Pictures with sides of 64 pixels at most, their shape kept."""
    scale = _SIDES[1] / max(x.shape[2:])
    if scale >= 1:
        return x
    size = [max(8, round(side * scale)) for side in x.shape[2:]]
    return F.interpolate(x, size, mode="bilinear", antialias=True)


def own(sheet: Sheet, folder: Path, precision: str) -> Own:
    """The network kept in `folder`, or one trained now if that is of other pictures; says which, and how good it is."""
    kept = _kept(sheet, folder)
    if kept is None:
        _make(sheet, folder, precision)
        kept = _kept(sheet, folder)
    assert kept is not None
    config, net = kept
    net = net.to(device.device()).eval().requires_grad_(False)
    about = f"a small network trained on the training pictures, {config['quality']}"
    return Own(net, FeatureNetwork("own", net.features, about, weights_hash(folder)), config["classes"])


def _kept(sheet: Sheet, folder: Path) -> tuple[dict, OwnNetwork] | None:
    """Facts and network in a folder; None where it is missing, damaged or of other pictures, and so is made anew."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if (config["version"], config["fingerprint"]) != (VERSION, sheet.fingerprint):
            return None
        net = _fresh(config)
        net.load_state_dict(load_file(folder / "model.safetensors"))
        refuse_non_finite(net, "own")
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError):
        return None
    return config, net


def _make(sheet: Sheet, folder: Path, precision: str) -> None:
    """Train a network, test it on held-out pictures, and write both down."""
    began = time.monotonic()
    train, val = Pictures(sheet, "train"), Pictures(sheet, "val")
    labelled = len(sheet.classes) > 1 and bool((train.labels >= 0).all())
    config = {
        "version": VERSION,
        "fingerprint": sheet.fingerprint,
        "channels": sheet.channels,
        "classes": sheet.class_names if labelled else [],
        "stride": 1 if max(sheet.image_size) <= _SIDES[0] else 2,
        "steps": max(1, min(_STEPS, _EPOCHS * len(train) // _BATCH)),
    }
    net = _fresh(config).to(device.device(), memory_format=torch.channels_last)  # a third less time on a CPU
    _train(net, train, config, precision)
    config["quality"] = _accuracy(net, val) if labelled and (val.labels >= 0).all() else _recognition(net, val)
    print(f"Features `own`: {config['quality']}, trained in {time.monotonic() - began:.0f} s.", flush=True)
    _write(net, config, folder)


def _write(net: OwnNetwork, config: dict, folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(
        {name: value.contiguous().cpu() for name, value in net.state_dict().items()}, temporary / "model.safetensors"
    )
    (temporary / "config.json").write_text(json.dumps(config, indent=1))
    publish(temporary, folder)


def _fresh(config: dict) -> OwnNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(0, "own/init"))
        return OwnNetwork(config["channels"], len(config["classes"]) or 2 * FEATURES, config["stride"])


def _train(net: OwnNetwork, pictures: Pictures, config: dict, precision: str) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=_PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LR, total_steps=config["steps"])
    order = KeyedOrder(len(pictures), 0, "own/order")
    for step in track(range(config["steps"]), "Training features", transient=True):
        items = order.indices(range(step * _BATCH, (step + 1) * _BATCH))
        x = normalize(torch.stack([pictures[int(i)] for i in items]).to(device.device()))
        labels = pictures.labels[items].to(x.device) if config["classes"] else None
        optimizer.zero_grad()
        with device.autocast(precision):
            loss = _loss(net, x, labels, step * _BATCH)
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()


def _loss(net: OwnNetwork, x: Tensor, labels: Tensor | None, start: int) -> Tensor:
    """What the network is trained with at the position `start`: cross-entropy, or Barlow Twins without labels."""
    if labels is not None:
        return F.cross_entropy(net(view(x, "own/view", start, 0.1)).float(), labels)
    one, two = net(torch.cat([view(x, f"own/view {i}", start, 0.25) for i in (1, 2)])).float().chunk(2)
    return barlow_twins(one, two)


def barlow_twins(one: Tensor, two: Tensor) -> Tensor:
    """How far the correlation of two views' projections (B, d) is from the identity matrix."""
    one, two = ((z - z.mean(0)) / (z.std(0) + 1e-4) for z in (one, two))
    correlation = one.T @ two / len(one)
    same = correlation.diagonal()
    apart = correlation.square().sum() - same.square().sum()
    return (1 - same).square().sum() + _OFF_DIAGONAL * apart


def view(x: Tensor, purpose: str, start: int, strength: float) -> Tensor:
    """The pictures (B, C, H, W) moved, resized, and changed in brightness, contrast and noise by up to `strength`."""
    u = 2 * uniform(0, purpose, start, len(x), (5,)).to(x.device) - 1
    scale, contrast = 1 + strength * u[:, 0], 1 + 2 * strength * u[:, 1]
    zero = torch.zeros_like(scale)
    rows = [torch.stack([scale, zero, strength * u[:, 2]], 1), torch.stack([zero, scale, strength * u[:, 3]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    x = x * contrast[:, None, None, None] + strength * u[:, 4, None, None, None]
    return x + 0.2 * strength * normal(0, f"{purpose} noise", start, len(x), tuple(x.shape[1:])).to(x.device)


def _judged(pictures: Pictures) -> tuple[list[int], list[Tensor]]:
    """Some held-out pictures, in batches in [-1, 1]."""
    items = evenly_spaced(len(pictures), _JUDGED)
    stacks = (torch.stack([pictures[i] for i in items[at : at + 256]]) for at in range(0, len(items), 256))
    return items, [normalize(x.to(device.device())) for x in stacks]


@torch.no_grad()
def _accuracy(net: OwnNetwork, pictures: Pictures) -> str:
    items, batches = _judged(pictures)
    seen = torch.cat([net(x).argmax(1).cpu() for x in batches])
    return (
        f"right about {(seen == pictures.labels[items]).double().mean().item():.1%} of {len(items):,} held-out pictures"
    )


@torch.no_grad()
def _recognition(net: OwnNetwork, pictures: Pictures) -> str:
    """How often the nearest of another view's features, among up to 256 held-out pictures, is of the same picture."""
    _, (x, *_) = _judged(pictures)
    one, two = (F.normalize(net.features(view(x, f"own/judged {i}", 0, 0.25)), dim=1) for i in (1, 2))
    found = (one @ two.T).argmax(1) == torch.arange(len(x), device=x.device)
    return f"finds {found.double().mean().item():.1%} of {len(x):,} held-out pictures again by another view"
