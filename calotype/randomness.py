"""Every random number as a function of (seed, purpose, position); no global generator is ever read.

A *position* counts training examples over the whole run: step * global batch + place in the batch. It does not depend
on the number of processes, workers or micro-batches, so neither does the run.
"""

import hashlib

import numpy as np
import torch

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


def uniform(seed: int, purpose: str, start: int, count: int) -> torch.Tensor:
    """Uniform numbers (count,) in [0, 1) in float32, one for each position from `start` on."""
    return torch.from_numpy((_words(seed, purpose, start, count, 1)[:, 0] >> 40).astype(np.float32) / 2**24)


def normal(seed: int, purpose: str, start: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers (count, *shape) in float32, a block for each position from `start` on (Box-Muller)."""
    size = int(np.prod(shape))
    words = _words(seed, purpose, start, count, -(-size // 2))
    radius = np.sqrt(-2 * np.log(((words >> 32) + 1) / 2**32))
    angle = 2 * np.pi * (words & 0xFFFFFFFF) / 2**32
    pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :size]
    return torch.from_numpy(pairs.astype(np.float32)).reshape(count, *shape)


def numpy_generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """A NumPy generator of its own for this purpose and position."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *position)))
