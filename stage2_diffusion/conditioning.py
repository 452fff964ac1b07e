"""Class labels as the network sees them."""

from torch import Tensor

from calotype.randomness import uniform


def drop_labels(y: Tensor, null: int, probability: float, seed: int, start: int) -> Tensor:
    """Class ids (B,) with some replaced by the null class, so that one network learns both models (Ho & Salimans 2022).

    Unlabelled pictures (-1) always count as the null class.
    """
    hidden = uniform(seed, "label dropout", start, len(y)) < probability
    return y.masked_fill(hidden.to(y.device, non_blocking=True) | (y < 0), null)
