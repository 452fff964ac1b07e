"""What a network is told in words: class names, prompts, and blends of either.

This file travels inside every saved model beside `pipeline.py`, so it imports nothing but torch.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_NAMED = 60  # class names that a message lists


def blend(label: Any) -> dict[Any, float]:
    """A label as shares that sum to 1; raises ValueError."""
    if not isinstance(label, dict):
        _refuse_no_label(label)
        return {label: 1.0}
    for item in label:
        _refuse_no_label(item)
    total = sum(_share(value) for value in label.values())
    if not 0 < total < math.inf:
        raise ValueError(f"label={_short(label)}: a blend needs shares from 0 on, and one above 0.")
    return {item: share / total for item, share in label.items()}


def _share(value: Any) -> float:
    is_share = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    return float(value) if is_share else math.nan


def _refuse_no_label(label: Any) -> None:
    if label is not None and (isinstance(label, bool) or not isinstance(label, (str, int))):
        raise ValueError(f"label={_short(label)} must be a class name or id, a prompt, None, or a blend of these.")


def class_id(names: list[str], label: str | int | None) -> int:
    """The number of a class by name or number; the one after the last for None. Raises ValueError."""
    if label is None:
        return len(names)
    if isinstance(label, str):
        if label not in names:
            raise ValueError(f"label={_short(label)} is not known; this model knows {', '.join(names[:MOST_NAMED])}.")
        return names.index(label)
    if not 0 <= label < len(names):
        raise ValueError(f"label={label} must be from 0 to {len(names) - 1}.")
    return label


def class_labels(names: list[str], wanted: list) -> Tensor | None:
    """Class ids (B,), null for None; shares (B, classes + 1) if one is a blend; None without classes."""
    blends = [blend(label) for label in wanted]
    if not names:
        told = next((item for label in blends for item in label if item is not None), None)
        if told is not None:
            raise ValueError(f"label={_short(told)}: this model was trained without labels; leave it out.")
        return None
    blends = [{class_id(names, item): share for item, share in label.items()} for label in blends]
    if all(len(label) == 1 for label in blends):
        return torch.tensor([next(iter(label)) for label in blends])
    shares = torch.zeros(len(blends), len(names) + 1)
    for row, label in zip(shares, blends, strict=True):
        for item, share in label.items():
            row[item] += share
    return shares


def as_shares(y: Tensor, classes: int) -> Tensor:
    """Class ids (B,) as shares (B, classes)."""
    return F.one_hot(y, classes).float()


def token_ids(tokenizer, prompts: list[str]) -> Tensor:
    """Token ids (B, n) of prompts; raises ValueError for what is no text and for more than the model reads."""
    most = tokenizer.model_max_length
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"label={_short(prompt)}: this model draws from text; give a prompt.")
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError(f"label={_short(prompt)} holds half a character; type the prompt again.")
        count = len(tokenizer(prompt, verbose=False).input_ids)
        if count > most:
            raise ValueError(f"label={_short(prompt)} has {count} tokens, the model reads {most}; shorten it.")
    return tokenizer(prompts, padding="max_length", max_length=most, truncation=True, return_tensors="pt").input_ids


def mixed(states: dict[str, Tensor], prompts: list) -> Tensor:
    """Hidden states (B, n, d) of prompts and blends of them, out of those (n, d) of each prompt."""
    blends = [blend(prompt) for prompt in prompts]
    return torch.stack([sum(share * states[word or ""] for word, share in label.items()) for label in blends])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
