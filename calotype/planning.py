"""What a run will take and which run to choose, from what was measured: arithmetic alone, without torch.

It follows `calotype run`: of --max-minutes stage 1 has until 36 % and stage 2 until 92 %, whatever came before them
took; a stage ends with a validation, a checkpoint and its export, which are not counted in.
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from calotype.plan_pace import StageCost as StageCost
from calotype.plan_pace import training
from calotype.run import STAGE1_UNTIL, STAGE2_UNTIL

ENOUGH = 0.1  # of a preset's usual steps: with fewer a smaller preset is likely to be the better one
_LEAST_SHARE = 0.1  # of --max-minutes that a stage gets however late it begins
_STATISTICS = 16_384  # pictures whose latents are measured at the end of stage 1
_KEPT_PIXELS = 2**30  # bytes of decoded pictures that a process keeps
_SHEET, _FEATURE_STEPS, _FEATURE_PICTURES = 48, 200, 96
_SHEET_BYTES = 120_000
_FEATURE_BYTES = 4 * 128  # of one picture
_PICTURE_BYTES = 700  # of Python's, for one picture that is kept
_LEAST_LATENT = 6  # elements a side
_SPARE = 0.85  # of the free memory may be used


class Cost(NamedTuple):
    """What a piece of work takes: seconds by the clock and of the processor (all threads together)."""

    seconds: float
    cpu: float

    def times(self, factor: float) -> "Cost":
        """So many times as much."""
        return Cost(self.seconds * factor, self.cpu * factor)


@dataclass(frozen=True)
class Source:
    """How many pictures there are, and the bytes of one as it is trained on."""

    train: int
    val: int
    pixels: int
    record_bytes: float = 150.0  # of the data sheet

    @property
    def count(self) -> int:
        """All of them."""
        return self.train + self.val

    @property
    def kept(self) -> bool:
        """Whether pictures stay in memory once they are decoded."""
        return self.train * self.pixels <= _KEPT_PIXELS


@dataclass(frozen=True)
class Costs:
    """Seconds of everything else, most of them for one picture, and both stages."""

    start: float
    survey: float  # looking through the folder once
    check: float
    read: float
    encode: float
    look: float
    draw: float
    draw_exact: float
    features: float  # a step of the network that measures samples
    latent_values: int
    drawn: int  # samples of an evaluation
    encode_peak: int  # bytes of memory
    one: StageCost
    two: StageCost


class Part(NamedTuple):
    """One command of the run: optimiser steps (None: it takes none), seconds, bytes of memory and of disk."""

    name: str
    steps: int | None
    seconds: float
    memory: int
    disk: int


class Prediction(NamedTuple):
    """A run's commands in their order."""

    minutes: float  # --max-minutes
    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return sum(part.seconds for part in self.parts)

    @property
    def memory(self) -> int:
        """The most at any time, in bytes."""
        return max(part.memory for part in self.parts)

    @property
    def disk(self) -> int:
        """What the run leaves on the disk, in bytes."""
        return sum(part.disk for part in self.parts)

    def steps(self, name: str) -> int:
        """Of a stage."""
        return next(part.steps or 0 for part in self.parts if part.name == name)


def predict(source: Source, costs: Costs, minutes: float, steps: tuple[int, int] | None = None) -> Prediction:
    """A run with --max-minutes; with `steps` of both stages, one that takes these however long they last."""
    data = costs.survey + costs.check * source.count
    first = _stage_1(source, costs, _budget(STAGE1_UNTIL, minutes, data), steps and steps[0])
    encode = source.count * (costs.read + costs.encode)
    second = _stage_2(source, costs, _budget(STAGE2_UNTIL, minutes, data + first.seconds + encode), steps and steps[1])
    latents = 4 * costs.latent_values * source.count  # mean and deviation in fp16
    models = costs.one.model_bytes + costs.two.model_bytes
    export = 2 * _SHEET_BYTES + models
    after = (
        Part("export", None, _SHEET * costs.draw_exact, second.memory, export),
        Part("evaluate, report", None, _evaluation(source, costs), second.memory, source.val * _FEATURE_BYTES),
    )
    before = (
        Part("read pictures", None, data, 0, int(source.record_bytes * source.count)),
        first,
        Part("encode", None, encode, costs.encode_peak + _kept(source, source.count), latents),
    )
    return Prediction(minutes, _never_less((*before, second, *after)))


def _never_less(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """A process hardly gives memory back: what one command took the next has too."""
    most = accumulate((part.memory for part in parts), max)
    return tuple(part._replace(memory=memory) for part, memory in zip(parts, most, strict=True))


def _kept(source: Source, count: int) -> int:
    """Bytes of so many pictures that are kept once they are decoded."""
    return source.kept * count * (source.pixels + _PICTURE_BYTES)


def _budget(until: float, minutes: float, spent: float) -> float:
    """Seconds that `calotype run` gives to a stage after `spent` of them."""
    return max(until * 60 * minutes - spent, _LEAST_SHARE * 60 * minutes)


def _stage_1(source: Source, costs: Costs, budget: float, steps: int | None) -> Part:
    """Stage 1 after its start; pictures are decoded when they are first needed, or each time if they are too many."""
    stage = costs.one
    most = source.train if source.kept else None
    count, looped = training(stage, budget, costs.read, most, steps)
    unseen = 1 - min(1.0, count * stage.batch / source.train) if source.kept else 1.0
    statistics = min(source.train, _STATISTICS)
    closing = stage.look + stage.checkpoint + stage.export + statistics * (costs.encode + costs.read * unseen)
    seconds = costs.start + stage.setup + looped + closing
    return Part("stage 1", count, seconds, stage.peak + _kept(source, source.train), _left_behind(stage, count))


def _stage_2(source: Source, costs: Costs, budget: float, steps: int | None) -> Part:
    stage = costs.two
    count, looped = training(stage, budget, 0.0, None, steps)
    closing = stage.look + stage.checkpoint + stage.export
    memory = stage.peak + 4 * costs.latent_values * source.train  # the shards are mapped
    return Part("stage 2", count, stage.setup + looped + closing, memory, _left_behind(stage, count))


def _left_behind(stage: StageCost, steps: int) -> int:
    """Bytes of a stage's folder."""
    checkpoints = min(stage.keep, 1 + steps // stage.checkpoint_every) * stage.checkpoint_bytes
    each = stage.snapshot_bytes + _SHEET_BYTES // 2
    return checkpoints + stage.model_bytes + min(stage.validations, steps) * each


def _evaluation(source: Source, costs: Costs) -> float:
    """Held-out pictures through the autoencoder and the features, the features' training, and the drawing."""
    trained = _FEATURE_STEPS * costs.features + min(source.train, _FEATURE_STEPS * _FEATURE_PICTURES) * costs.read
    held_out = source.val * (costs.read + costs.look + costs.features / 3 / _FEATURE_PICTURES)
    return trained + held_out + costs.drawn * costs.draw


def plan_for(source: Source, costs: Costs, hours: float) -> Prediction:
    """The prediction with the largest --max-minutes whose whole run ends within the hours."""
    low, high = 0.0, 60 * hours
    if predict(source, costs, high).seconds <= 3600 * hours:
        return predict(source, costs, high)
    for _ in range(40):
        middle = (low + high) / 2
        if predict(source, costs, middle).seconds <= 3600 * hours:
            low = middle
        else:
            high = middle
    return predict(source, costs, low)


def completeness(costs: Costs, prediction: Prediction) -> float:
    """How much of its preset's usual steps a run takes, in the stage that has less."""
    shares = (prediction.steps("stage 1") / costs.one.usual, prediction.steps("stage 2") / costs.two.usual)
    return min(shares)


def choose(source: dict[str, Source], costs: dict[str, Costs], hours: float) -> str:
    """The largest preset that has enough of its usual steps in that time, else the smallest; presets by size."""
    enough = [
        name for name, found in costs.items() if completeness(found, plan_for(source[name], found, hours)) >= ENOUGH
    ]
    return enough[-1] if enough else next(iter(costs))


def least_hours(source: Source, costs: Costs, share: float) -> float:
    """The shortest time in which a preset has that share of its usual steps in both stages."""
    low, high = 0.0, 1e-3
    while completeness(costs, plan_for(source, costs, high)) < share and high < 1e6:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        short = completeness(costs, plan_for(source, costs, middle)) < share
        low, high = (middle, high) if short else (low, middle)
    return high


def batch_that_fits(stage: StageCost, free: int, besides: int) -> int | None:
    """The largest of the batch, its half, its quarter … that leaves some memory free; None where not even one does."""
    batch = stage.batch
    while stage.peak - (stage.batch - batch) * stage.each + besides > _SPARE * free:
        if batch % 2:
            return None
        batch //= 2
    return batch


def side_for(usual: int, own: int | None, multiple: int) -> int:
    """The side to train at: the preset's, or where pictures are smaller their own, as a multiple.

    A little border is better than pixels that are cut away: 28 becomes 32, and 100 becomes 96.
    """
    if own is None or own >= usual:
        return usual
    above = math.ceil(own / multiple) * multiple
    return above if above <= 1.15 * own or above == multiple else above - multiple


def factor_for(usual: int, side: int) -> int:
    """The preset's factor, or a smaller one, so that latents keep 6 elements a side where they can."""
    while usual > 2 and side // usual < _LEAST_LATENT:
        usual //= 2
    return usual
