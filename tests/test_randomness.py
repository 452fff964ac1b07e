import numpy as np
import pytest
import torch

from calotype.randomness import KeyedOrder, key, normal, uniform


def test_a_block_of_positions_is_cut_from_the_whole():
    whole = normal(3, "noise", 0, 96, (2, 5, 3))
    assert torch.equal(whole[37:60], normal(3, "noise", 37, 23, (2, 5, 3)))
    assert torch.equal(uniform(3, "time", 0, 96)[50:], uniform(3, "time", 50, 46))


def test_seeds_and_purposes_give_other_numbers():
    base = normal(0, "a", 0, 4, (8,))
    assert not torch.equal(base, normal(1, "a", 0, 4, (8,)))
    assert not torch.equal(base, normal(0, "b", 0, 4, (8,)))
    assert key(0, "a", 1) != key(0, "a", 2)


def test_known_value_holds_on_every_machine():
    assert key(0, "order", 1) == 8024286156118006313


@pytest.mark.parametrize("count, shape", [(0, (3,)), (1, (1,)), (5, (3,)), (7, (4, 8, 8)), (9, (4, 64, 64)), (3, ())])
def test_normal_numbers_are_those_of_the_formula(count, shape):
    """Box and Muller (1958) at once, on words of 64 bits from NumPy's Philox."""
    size = int(np.prod(shape))
    words = -(-size // 2)
    blocks = -(-words // 4)
    bits = np.random.Philox(key=key(5, "noise"), counter=11 * blocks).random_raw(count * blocks * 4)
    bits = bits.reshape(count, -1)[:, :words] if count else np.zeros((0, words), np.uint64)
    radius = np.sqrt(-2 * np.log(((bits >> 32) + 1) / 2**32))
    angle = 2 * np.pi * (bits & 0xFFFFFFFF) / 2**32
    whole = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :size].astype(np.float32)
    assert np.array_equal(normal(5, "noise", 11, count, shape).numpy(), whole.reshape(count, *shape))


def test_normal_numbers_follow_the_normal_distribution():
    x = normal(0, "noise", 0, 4000, (64,)).flatten().double().sort().values
    theory = torch.distributions.Normal(0.0, 1.0).cdf(x)
    steps = torch.arange(1, len(x) + 1, dtype=torch.double) / len(x)
    assert (theory - steps).abs().max() < 1.95 / len(x) ** 0.5  # Kolmogorov-Smirnov, p = 0.001
    correlation = torch.corrcoef(normal(0, "noise", 0, 4000, (4,)).T)
    assert (correlation - torch.eye(4)).abs().max() < 0.06


def test_uniform_numbers_fill_the_interval():
    u = uniform(0, "time", 0, 100_000)
    assert u.min() >= 0 and u.max() < 1
    assert torch.histc(u, 20, 0, 1).sub(5000).abs().max() < 350


@pytest.mark.parametrize("size", [1, 7, 64, 65, 1000, 64 * 256, 64 * 256 + 17, 50_000])
def test_each_epoch_holds_each_item_once(size):
    order = KeyedOrder(size, seed=1)
    first = order.indices(range(size))
    second = order.indices(range(size, 2 * size))
    assert sorted(first) == sorted(second) == list(range(size))
    if size > 10:
        assert not np.array_equal(first, second)


def test_sorted_classes_are_mixed_in_every_batch():
    labels = np.repeat(np.arange(10), 5000)
    order = KeyedOrder(50_000, seed=0)
    for start in range(0, 50_000, 5000):
        assert len(set(labels[order.indices(range(start, start + 128))])) >= 9


def test_memory_for_a_hundred_million_items_is_a_number_a_block():
    order = KeyedOrder(10**8, seed=0)
    assert 0 <= order.index(3 * 10**8 - 1) < 10**8
