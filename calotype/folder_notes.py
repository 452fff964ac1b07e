"""What a person should hear about a folder although nothing in it is wrong enough to refuse it."""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

from calotype.folder import METADATA, SUFFIXES, Survey
from calotype.picture_files import Header, display_name

_SPLITS = frozenset(["train", "training", "val", "valid", "validation", "test"])
_TEXTS = frozenset([".txt", ".json", ".jsonl", ".csv", ".md", ""])


def notes(found: Survey) -> list[str]:
    """One sentence each, without the folder's name."""
    labels = sorted({entry.label for entry in found.entries if entry.label})
    by_metadata = any(name in found.files for name in METADATA)
    sentences = [_strangers(found.files), _twins(labels)]
    if by_metadata:
        sentences.append(_unnamed(found))
    else:
        sentences += [_captions(found), _empty_classes(found, labels), _splits(labels)]
    return [sentence for sentence in sentences if sentence]


def header_notes(headers: list[Header]) -> list[str]:
    """What the gate does to some pictures and their owner may not expect."""
    moving = sum(header.animated for header in headers)
    deep = sum(header.mode[0] in "IF" for header in headers)
    sentences = []
    if moving:
        sentences.append(f"{_counted(moving, 'file')} of more than one frame or page: the first is taken.")
    if deep:
        sentences.append(f"{_counted(deep, 'file')} of more than 8 bits a sample: scaled to 8, nothing is clipped.")
    return sentences


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _strangers(files: Iterable[str]) -> str:
    endings = Counter(os.path.splitext(name)[1].lower() for name in files)
    strange = {ending: n for ending, n in endings.items() if ending not in SUFFIXES | _TEXTS}
    if not strange:
        return ""
    named = ", ".join(f"{display_name(ending)} {n:,}" for ending, n in Counter(strange).most_common(5))
    return f"{_counted(sum(strange.values()), 'file')} of other kinds, passed over ({named})."


def _twins(labels: list[str]) -> str:
    """Names that a person, or another computer, would take for one: by case, or by the form of an accent."""
    alike = defaultdict(list)
    for label in labels:
        alike[unicodedata.normalize("NFC", label).casefold()].append(label)
    pair = next((names for names in alike.values() if len(names) > 1), None)
    if pair is None:
        return ""
    return f"Classes {pair[0]!a} and {pair[1]!a} differ in case or in the form of an accent alone; they stay two."


def _unnamed(found: Survey) -> str:
    named = {entry.file for entry in found.entries}
    others = [name for name in found.files if _is_picture(name) and name not in named]
    if not others:
        return ""
    return f"{_counted(len(others), 'picture')} not named in the metadata file, left out (first {_first(others)})."


def _captions(found: Survey) -> str:
    """Captions whose picture is missing, where others have theirs."""
    if not any(entry.text for entry in found.entries):
        return ""
    stems = {os.path.splitext(name)[0] for name in found.files if _is_picture(name)}
    lonely = [name for name in found.files if name.endswith(".txt") and name[:-4] not in stems]
    return f"{_counted(len(lonely), 'caption')} without a picture (first {_first(lonely)})." if lonely else ""


def _empty_classes(found: Survey, labels: list[str]) -> str:
    empty = [name for name in found.folders if name not in labels] if labels else []
    return f"{_counted(len(empty), 'folder')} without a picture, no class (first {_first(empty)})." if empty else ""


def _splits(labels: list[str]) -> str:
    if len(labels) < 2 or not {label.lower() for label in labels} <= _SPLITS:
        return ""
    return f"The classes are called {' and '.join(labels)}; if they are splits, give one as SOURCE, another as --val."


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _first(names: list[str]) -> str:
    return display_name(names[0])
