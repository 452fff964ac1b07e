"""Whether a folder is still what its data sheet says: a run must not go on with other pictures unnoticed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from calotype.errors import UserError
from calotype.folder import Entry, Survey, on_disk, survey
from calotype.picture_files import display_name
from calotype.reading import each, sha256


class Changes(NamedTuple):
    """Names of the files that are not as the sheet says."""

    missing: list[str]
    added: list[str]
    changed: list[str]

    def __bool__(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        counted = [f"{len(names):,} {kind}" for kind, names in zip(self._fields, self, strict=True) if names]
        kind, names = next((kind, names) for kind, names in zip(self._fields, self, strict=True) if names)
        return f"{', '.join(counted)}, first {display_name(names[0])}" + (f" ({kind})" if len(counted) > 1 else "")


class _Known(NamedTuple):
    """What the sheet says of a file; None where it was unreadable, so that nothing but its size is known."""

    label: str | None
    text: str | None
    bytes: int
    sha256: str


def refuse_changed(sheet, *, allowed: bool, say: Callable[[str], None] = print) -> None:
    """Raise UserError if the pictures are not those that the sheet names; say it where allowed."""
    found = changes(sheet)
    if found and not allowed:
        raise UserError(
            f"SOURCE {sheet.root}: {found} since {sheet.file} was written; put that right, or give "
            "--allow-data-change to go on with the folder as it is now."
        )
    if found:
        say(f"SOURCE {sheet.root}: {found} since {sheet.file} was written; goes on with the folder as it is now.")


def changes(sheet) -> Changes:
    """What differs from the sheet: names, sizes, labels, captions; and content, of files that are younger than it.

    Nothing is said of a sheet made just now, or a source that is drawn, or gone as a whole: who needs it will name it.
    """
    found = Changes([], [], [])
    if not sheet.file or not sheet.listing or not Path(sheet.root).is_dir():
        return found
    written = sheet.file.stat().st_mtime_ns
    for root, is_val in ((sheet.root, False), (sheet.val_root, True)):
        if root:
            some = _compare(Path(root), _known(sheet, root, is_val), survey(Path(root)), written)
            for names, more in zip(found, some, strict=True):
                names += more
    return found


def holds_other_pictures(run: Path) -> bool:
    """Whether the latents of a run are of other pictures than its data sheet names."""
    try:
        sheet, latents = (json.loads((run / name).read_text()) for name in ("data.json", "latents/encoding.json"))
        return sheet["fingerprint"] != latents["fingerprint"]
    except (OSError, ValueError, KeyError):
        return False  # not both are there: the commands that need them will say so


def _known(sheet, root: str, is_val: bool) -> dict[str, _Known]:
    names = [*sheet.class_names, ""]  # label -1 is none
    here = [record for record in sheet.records if not sheet.val_root or record.val == is_val]
    known = {record.file: _Known(names[record.label], record.text, record.bytes, record.sha256) for record in here}
    bad = [entry for entry in sheet.bad if entry.get("root", sheet.root) == root]
    return known | {entry["file"]: _Known(None, None, entry["bytes"], "") for entry in bad}


def _compare(root: Path, known: dict[str, _Known], seen: Survey, written: int) -> Changes:
    now = {entry.file: entry for entry in seen.entries}
    absent = [name for name in known if name not in now or _is_gone(root, name, now[name], known[name])]
    gone = set(absent)
    both = [name for name in now if name in known and name not in gone]
    changed = [name for name in both if _differs(now[name], known[name])]
    sure = set(changed)
    young = [name for name in both if name not in sure and known[name].sha256 and _is_young(seen, name, written)]
    hashes = each(lambda name: sha256(on_disk(root, name)), young)
    changed += [name for name, digest in zip(young, hashes, strict=True) if digest != known[name].sha256]
    return Changes(absent, [name for name in now if name not in known], changed)


def _is_gone(root: Path, name: str, entry: Entry, known: _Known) -> bool:
    """A metadata file, or a link, may still name what is no longer there."""
    return not entry.bytes and bool(known.bytes) and not on_disk(root, name).is_file()


def _differs(entry: Entry, known: _Known) -> bool:
    if known.label is None:
        return entry.bytes != known.bytes
    return (entry.label, entry.text, entry.bytes) != (known.label, known.text, known.bytes)


def _is_young(seen: Survey, name: str, written: int) -> bool:
    status = seen.files.get(name)
    return status is None or status.touched >= written
