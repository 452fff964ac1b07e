"""Every random number as a function of (seed, purpose, position); no global generator is ever read.

A *position* counts training examples over the whole run: step * global batch + place in the batch. It does not depend
on the number of processes, workers or micro-batches, so neither does the run.
"""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

_BLOCK, _WINDOW = 64, 256  # items in a block of the order, blocks in a window
_IN_CACHE = 32_768  # pairs of normal numbers that are made at once, so that what is between stays in a core's cache
_WORDS_PER_BLOCK = 4  # Philox 4x64 yields four words for each value of its counter


def key(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit integer that is the same on every machine for the same arguments."""
    text = "/".join(map(str, (seed, purpose, *position)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _words(seed: int, purpose: str, start: int, count: int, each: int) -> np.ndarray:
    """Random 64-bit words (count, each) for the positions start … start + count - 1."""
    blocks = -(-each // _WORDS_PER_BLOCK)
    bits = np.random.Philox(key=key(seed, purpose), counter=start * blocks)
    return bits.random_raw(count * blocks * _WORDS_PER_BLOCK).reshape(count, -1)[:, :each]


def uniform(seed: int, purpose: str, start: int, count: int, shape: tuple[int, ...] = ()) -> torch.Tensor:
    """Uniform numbers (count, *shape) in [0, 1) in float32, a block for each position from `start` on."""
    words = _words(seed, purpose, start, count, int(np.prod(shape)))
    return torch.from_numpy((words >> 40).astype(np.float32) / 2**24).reshape(count, *shape)


def normal(seed: int, purpose: str, start: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers (count, *shape) in float32, a block for each position from `start` on (Box-Muller)."""
    size = int(np.prod(shape))
    pairs = -(-size // 2)
    found, step = np.empty((count, 2 * pairs), dtype=np.float32), max(1, _IN_CACHE // max(pairs, 1))
    for first in range(0, count, step):
        part = found[first : first + step]
        _box_muller(_words(seed, purpose, start + first, len(part), pairs), part)
    return torch.from_numpy(found[:, :size]).reshape(count, *shape)


def _box_muller(words: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` (n, 2 k) with normal numbers from words (n, k): the cosines, and then the sines."""
    radius = np.log(((words >> 32) + 1) / 2**32)
    radius *= -2
    np.sqrt(radius, out=radius)
    angle = 2 * np.pi * (words & 0xFFFFFFFF) / 2**32
    k = words.shape[1]
    wave = np.cos(angle)
    np.multiply(radius, wave, out=out[:, :k], casting="same_kind")
    np.multiply(radius, np.sin(angle, out=wave), out=out[:, k:], casting="same_kind")


def numpy_generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """A NumPy generator of its own for this purpose and position."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *position)))


class KeyedOrder(NamedTuple):
    """An endless order of `size` items, shuffled anew each epoch, read at any position without going through the rest.

    A block shuffle: blocks of neighbours are permuted, then the items within each window of blocks. Any block meets
    any other, disks read runs of neighbours, and memory is one number a block even for 10^8 items.
    """

    size: int
    seed: int
    purpose: str = "order"

    def indices(self, positions: Iterable[int]) -> np.ndarray:
        """The items (n,) at these positions, counted over all epochs."""
        return np.array([self.index(position) for position in positions], dtype=np.int64)

    def index(self, position: int) -> int:
        """The item at one position."""
        epoch, offset = divmod(position, self.size)
        _, starts = _blocks(self, epoch)
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        return int(_window(self, epoch, window)[offset - starts[window]])


@lru_cache(maxsize=4)
def _blocks(order: KeyedOrder, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The permuted blocks of an epoch, and the offset at which each window starts."""
    count = -(-order.size // _BLOCK)
    blocks = numpy_generator(order.seed, order.purpose, epoch).permutation(count)
    lengths = np.where(blocks == count - 1, order.size - (count - 1) * _BLOCK, _BLOCK)
    return blocks, np.concatenate([[0], np.cumsum(lengths)[:-1]])[::_WINDOW]


@lru_cache(maxsize=8)
def _window(order: KeyedOrder, epoch: int, window: int) -> np.ndarray:
    """The items of one window, shuffled."""
    blocks = _blocks(order, epoch)[0][window * _WINDOW : (window + 1) * _WINDOW]
    items = (blocks[:, None] * _BLOCK + np.arange(_BLOCK)).ravel()
    return numpy_generator(order.seed, order.purpose, epoch, window).permutation(items[items < order.size])
