"""Does a model draw its training pictures again? For each sample the nearest training and the nearest held-out picture.

Had some pictures been held out in place of others, a model that learns the distribution would draw such samples all the
same; so which of the samples' neighbours were trained on is a matter of chance. The test asks how often that chance
would leave the held-out pictures as bare as they are: a permutation test, exact whatever the number of pictures of each
kind, and however popular some of them are as neighbours. (For the question see Meehan et al. 2020, data-copying.)
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calotype import device
from calotype.checkpoint import write_text
from calotype.data import Pictures, evenly_spaced
from calotype.features import layout
from calotype.images import image_grid
from calotype.manifold import nearest, nearest_other
from calotype.pipeline.measured import Samples
from calotype.pipeline.references import reference
from calotype.randomness import numpy_generator

_PERMUTATIONS = 9999
_SURE = 0.001  # a verdict is wrong by chance once in so many
_MUCH = 0.1  # share of copies from which a model memorises
_COLUMNS = 12
_YARDSTICK = 1000  # held-out pictures that samples are compared with
_TINY = 1e-12  # squared distance that counts as none


class Neighbours(NamedTuple):
    """For each sample the squared distance (n,) to the nearest training and held-out picture, and which these are."""

    train: Tensor
    train_item: Tensor
    val: Tensor
    val_item: Tensor

    @property
    def nearer(self) -> Tensor:
        """1 where the training picture is nearer, 0 where the held-out one is, 1/2 for a tie (n,)."""
        return (self.train < self.val).double() + (self.train == self.val).double() / 2


class Finding(NamedTuple):
    """What the permutation test finds."""

    nearer: float  # share of samples whose nearest picture is a training picture
    chance: float  # the same if nothing is copied
    copied: float  # share of samples that are copies: 1 if held-out pictures are never nearest, about 0 if by chance
    error: float  # standard error of it, if nothing is copied
    p: float  # probability of held-out pictures that are as bare by chance
    least_p: float  # and of held-out pictures that are never nearest

    @property
    def verdict(self) -> str:
        """One sentence."""
        facts = f"{self.nearer:.1%} of samples are nearest to a training picture, {self.chance:.1%} would be by chance"
        if self.p <= _SURE and self.copied >= _MUCH:
            return f"memorises: {facts}"
        if self.least_p > _SURE:
            return f"cannot tell: {facts}, but too few pictures are held out or sampled; hold out more with --val"
        return f"no sign of memorisation: {facts}"


def audit(folder: Path, splits: dict[str, Pictures], samples: Samples) -> dict[str, dict]:
    """Entries for metrics.json, with a page of pairs and a verdict in FOLDER."""
    network = layout()
    train, val = (reference(folder, split, splits[split], network) for split in ("train", "val"))
    made = network.of(samples.batches(), device.device())
    found = Neighbours(*nearest(made, train), *nearest(made, val))
    real = held_out(train, val)
    test = permutation_test(found, len(train), len(val))
    page = folder / "memorisation.png"
    pairs(found, splits, samples).save(page)
    print(f"Memorisation: {test.verdict}; look at {page}.")
    write_text(folder / "memorisation.json", json.dumps(test._asdict() | {"verdict": test.verdict}, indent=1))
    entries = {
        "copied": {"value": test.copied, "how": f"share of copies among samples, p = {test.p:.2g}, {test.verdict}"},
        "distance_ratio": _ratio(found, real),
        "authenticity": _authenticity(found, real, train),
    }
    entries["copied"] |= {"low": test.copied - 1.96 * test.error, "high": min(test.copied + 1.96 * test.error, 1.0)}
    about = f"{samples.contract}; against {len(train):,} training and {len(val):,} held-out pictures"
    shared = {"n": len(made), "contract": f"{about}; features {network.name}: {network.about}"}
    return {f"{name}[{network.name}]": entry | shared for name, entry in entries.items()}


def permutation_test(found: Neighbours, train: int, val: int) -> Finding:
    """Test whether the samples know which of `train` + `val` pictures were trained on."""
    nearer = found.nearer
    hits = torch.cat(
        [
            torch.bincount(found.train_item, nearer, minlength=train),
            torch.bincount(found.val_item, 1 - nearer, minlength=val),
        ]
    )
    n, every = len(nearer), train + val
    held_out, expected = hits[train:].sum().item(), n * val / every
    by_chance = _permuted(hits[hits > 0].numpy(), every, val)
    variance = val * (1 - val / every) * hits.var().item()  # of a sum drawn without replacement
    return Finding(
        nearer=1 - held_out / n,
        chance=1 - val / every,
        copied=1 - held_out / expected,
        error=variance**0.5 / expected,
        p=_tail(by_chance, held_out),
        least_p=_tail(by_chance, 0.0),
    )


def _permuted(hits: np.ndarray, every: int, val: int) -> np.ndarray:
    """Samples that fall to the held-out pictures when these are drawn anew from all, again and again."""
    generator = numpy_generator(0, "memorisation")
    counts = generator.hypergeometric(len(hits), every - len(hits), val, _PERMUTATIONS)
    return np.array([generator.permutation(hits)[:count].sum() for count in counts])


def _tail(by_chance: np.ndarray, seen: float) -> float:
    return (1 + int((by_chance <= seen + 1e-9).sum())) / (1 + len(by_chance))


def _ratio(found: Neighbours, real: Neighbours) -> dict:
    """Distance to the nearest training picture over that to the nearest held-out one, against held-out pictures.

    The larger set is nearer by chance; that is so for held-out pictures as well, each compared with the others.
    """
    made, alone = ((side.train / side.val.clamp_min(_TINY)).median() for side in (found, real))
    how = "median distance to training over held-out pictures, that of held-out pictures being 1; towards 0 for copies"
    return {"value": (made / alone.clamp_min(_TINY)).sqrt().item(), "how": how}


def _authenticity(found: Neighbours, real: Neighbours, train: Tensor) -> dict:
    """Authenticity (Alaa et al. 2022) of the samples, and of held-out pictures as a yardstick."""
    made, usual = (_authentic(side, train) for side in (found, real))
    how = (
        f"share of samples farther from a training picture than its own neighbour is, {usual:.3f} of held-out pictures"
    )
    return {"value": made, "how": how}


def _authentic(found: Neighbours, train: Tensor) -> float:
    """Share of pictures that lie farther from their training picture than the nearest other training picture does."""
    which, back = found.train_item.unique(return_inverse=True)
    return (found.train > nearest_other(train, which)[back]).double().mean().item()


def held_out(train: Tensor, val: Tensor) -> Neighbours:
    """What samples are compared with: at most 1,000 held-out pictures, each among the others."""
    rows = torch.tensor(evenly_spaced(len(val), _YARDSTICK))
    return Neighbours(*nearest(val[rows], train), nearest_other(val, rows), rows)


def pairs(found: Neighbours, splits: dict[str, Pictures], samples: Samples):
    """A sheet of samples above their nearest training and held-out pictures: the nearest pairs, then some of all."""
    order = (found.train / found.val.clamp_min(_TINY)).argsort()
    rows = []
    for chosen in (order[:_COLUMNS], order[evenly_spaced(len(order), _COLUMNS)]):
        rows.append(samples.x[chosen])
        for split, items in (("train", found.train_item), ("val", found.val_item)):
            rows.append(torch.stack([splits[split][int(i)] for i in items[chosen]]))
    return image_grid(torch.cat(rows), len(rows[0]), row_labels=["sample", "training", "held out"] * 2)
