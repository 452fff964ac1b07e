"""What a detector found of many pictures: all their scores, and the few of them that a page shows."""

import heapq
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from calotype.density.calibration import COMBINATION, TYPICALITY
from calotype.folder import Entry
from calotype.images import denormalize
from calotype.randomness import key

RAW = ("elbo", "flow", "diffusion")  # likelihoods as they are, which can prefer simple pictures
TOO_LIKELY = 0.95  # of held-out normal pictures are stranger, by a raw likelihood
_FEW = 12  # of pictures that are shown beside the strangest


class Seen(NamedTuple):
    """A picture to be shown: its number among all, uint8 (C, H, W), its map (H, W) and its nearest normal ones (3,)."""

    number: int
    pixels: Tensor
    map: Tensor
    neighbours: list[int]


class Best:
    """The pictures with the largest keys, at most `most`, of however many are offered."""

    def __init__(self, most: int):
        self.most = most
        self._heap: list[tuple[float, int, Seen]] = []

    def offer(self, value: float, seen: Seen) -> None:
        """Keep it if there is room, or if another one is less; of equals the earlier one stays."""
        item = (value, -seen.number, seen)
        if len(self._heap) < self.most:
            heapq.heappush(self._heap, item)
        elif self._heap and item > self._heap[0]:
            heapq.heapreplace(self._heap, item)

    def ranked(self) -> list[Seen]:
        """Those that were kept, the largest key first."""
        return [seen for *_, seen in sorted(self._heap, key=lambda item: item[:2], reverse=True)]


class Found:
    """Scores and p of all pictures that could be read, those that could not with the reason, and some to be shown.

    `limits` says from which value of each score on an alarm is raised.
    """

    def __init__(self, limits: dict[str, float], show: int):
        self.limits = limits
        self.entries: list[Entry] = []
        self.broken: list[tuple[Entry, str]] = []
        self.strangest, self._likely, self._others = Best(show), Best(_FEW), Best(_FEW)
        self._scores: dict[str, list[Tensor]] = {name: [] for name in limits}
        self._p: dict[str, list[Tensor]] = {name: [] for name in limits}

    def add(self, entries: list[Entry], x: Tensor, examined) -> None:
        """Take in a batch of pictures x (B, C, H, W) in [-1, 1] that were examined."""
        alarm = self._alarm(examined.scores[COMBINATION], COMBINATION)
        likely = self.too_likely(examined.scores, examined.p).any(0)
        for name in self.limits:
            self._scores[name].append(examined.scores[name])
            self._p[name].append(examined.p[name])
        pixels, maps = denormalize(x.cpu()), examined.maps.half()
        for i, score in enumerate(examined.scores[COMBINATION].tolist()):
            seen = Seen(len(self.entries) + i, pixels[i].clone(), maps[i].clone(), examined.neighbours[i].tolist())
            self.strangest.offer(score, seen)
            if likely[i]:
                self._likely.offer(score, seen)
            if not alarm[i]:
                self._others.offer(key(0, "anomalies/others", seen.number), seen)
        self.entries += entries

    @property
    def scores(self) -> dict[str, Tensor]:
        """Every score of every picture (N,)."""
        return {name: torch.cat(parts) for name, parts in self._scores.items()}

    @property
    def p(self) -> dict[str, Tensor]:
        """For every score and picture (N,) the share of held-out normal pictures at least as strange."""
        return {name: torch.cat(parts) for name, parts in self._p.items()}

    @property
    def alarm(self) -> Tensor:
        """Which pictures (N,) raise the alarm."""
        return self._alarm(torch.cat(self._scores[COMBINATION]), COMBINATION)

    def _alarm(self, scores: Tensor, name: str) -> Tensor:
        return scores >= self.limits[name]

    @property
    def raw(self) -> list[str]:
        """Those of the scores that are a likelihood as it is."""
        return [name for name in RAW if name in self.limits]

    def too_likely(self, scores: dict[str, Tensor], p: dict[str, Tensor]) -> Tensor:
        """For each raw likelihood (K, N): likelier than nearly all normal pictures, though others raise the alarm."""
        strange = self._alarm(scores[COMBINATION], COMBINATION)
        if TYPICALITY in self.limits:
            strange |= self._alarm(scores[TYPICALITY], TYPICALITY)
        likely = [strange & (p[name] > TOO_LIKELY) for name in self.raw]
        return torch.stack(likely) if likely else torch.zeros(0, len(strange), dtype=torch.bool)

    def likely(self) -> list[Seen]:
        """Some of the pictures that are too likely, the strangest first."""
        return self._likely.ranked()

    def others(self, shown: Iterable[Seen]) -> list[Seen]:
        """Some of those that raise no alarm and are not shown already, the strangest first."""
        numbers, scores = {seen.number for seen in shown}, torch.cat(self._scores[COMBINATION])
        left = [seen for seen in self._others.ranked() if seen.number not in numbers]
        return sorted(left, key=lambda seen: -float(scores[seen.number]))
