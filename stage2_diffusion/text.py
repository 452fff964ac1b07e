"""Captions as the network reads them: a tokenizer made of the user's own words, and a small CLIP text encoder."""

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch

from calotype.errors import UserError
from calotype.randomness import key
from calotype.weights import first_line, load_network

_START, _END = "<|startoftext|>", "<|endoftext|>"
_MOST_WORDS = 8192  # of the vocabulary
_MOST_TOKENS = 77  # of a caption, as in CLIP
_PRIVATE = 0xE000  # where Unicode's characters for private use begin
_HEAD = 32


def train_tokenizer(captions: Iterable[str]):
    """A `CLIPTokenizer` by byte-pair encoding of these captions (Sennrich et al. 2016), as long as the longest of them.

    Raises UserError without the extra [text], or where no picture has a caption.
    """
    _need_transformers()
    from transformers import CLIPTokenizer

    captions = [caption for caption in captions if caption]
    if not captions:
        raise UserError(
            "--condition text: no picture has a caption; give them in metadata.jsonl, or as x.txt beside x.jpg."
        )
    vocabulary, merges = _byte_pairs(captions)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=_END)
    longest = max(len(ids) for ids in tokenizer(list(dict.fromkeys(captions))).input_ids)
    tokenizer.model_max_length = min(_MOST_TOKENS, -(-longest // 8) * 8)
    return tokenizer


def _byte_pairs(captions: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of CLIP's kind: the last character of a word has `</w>` after it.

    The library numbers such characters in the order of a hash, differently each time, and ties between pairs go by
    number; so it is given single private characters in their place, whose order is fixed.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    last = {character: chr(_PRIVATE + ord(character)) for character in alphabet}
    normal = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    split = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pieces = (word for text in captions for word, _ in split.pre_tokenize_str(normal.normalize_str(text)))
    tokenizer = Tokenizer(models.BPE())
    letters = [*alphabet, *last.values()]  # whole, so that no prompt holds an unknown word
    trainer = trainers.BpeTrainer(vocab_size=_MOST_WORDS, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator((word[:-1] + last[word[-1]] for word in pieces), trainer)
    ends = str.maketrans({private: f"{character}</w>" for character, private in last.items()})
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [(first.translate(ends), second.translate(ends)) for first, second in pairs]
    words = [_START, _END, *alphabet, *(f"{c}</w>" for c in alphabet), *(first + second for first, second in merges)]
    return {word: i for i, word in enumerate(dict.fromkeys(words))}, merges


def build_encoder(tokenizer, width: int, layers: int, seed: int):
    """A `CLIPTextModel` for the tokens of `tokenizer`, with weights that follow from the seed."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // _HEAD),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "text encoder"))
        return CLIPTextModel(config)


def load(folder: Path, flag: str):
    """Tokenizer and `CLIPTextModel` of a folder, of its tokenizer/ and text_encoder/, or of a run; raises UserError."""
    _need_transformers()
    from transformers import CLIPTextModel, CLIPTokenizer

    if (folder / "stage2_diffusion").is_dir():
        folder = folder / "stage2_diffusion"
    parts = [folder / name if (folder / name).is_dir() else folder for name in ("tokenizer", "text_encoder")]
    if not (parts[1] / "config.json").is_file():
        raise UserError(f"{flag} {folder} holds no CLIP tokenizer and text model (no config.json in {parts[1]}).")
    encoder = load_network(CLIPTextModel, parts[1], f"{flag} {folder}")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(parts[0], local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its files are read by code of many kinds
        raise UserError(f"{flag} {folder} holds no CLIP tokenizer ({first_line(error)}).") from None
    tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    return tokenizer, encoder


def tokens(tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (B, L), padded to the tokenizer's length."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write the tokenizer for old and new readers: tokenizer.json, and vocab.json with merges.txt."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def _need_transformers() -> None:
    """Raise UserError where the extra is missing; where it is not, keep its progress bars out of ours."""
    if not (find_spec("transformers") and find_spec("tokenizers")):
        raise UserError("--condition text needs transformers; install it with pip install 'calotype[text]'.")
    from transformers.utils import logging

    logging.disable_progress_bar()
