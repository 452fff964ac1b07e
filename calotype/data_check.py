"""`calotype data check`: what a run would make of every file of a folder. It writes nothing and needs no torch."""

import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from rich.progress import track

from calotype.config import PROCEDURAL
from calotype.errors import UserError
from calotype.folder import Entry, Survey, on_disk, survey
from calotype.folder_notes import header_notes, notes
from calotype.picture_files import Header, UnreadableImage, display_name, inspect
from calotype.reading import BAD_SHARE, each, listing, refuse_many_bad

_MOST_LINKS = 10


class Verdict(NamedTuple):
    """A file and what the gate says of it: its header, or why it cannot be read."""

    entry: Entry
    header: Header | None
    fault: str = ""


class Check(NamedTuple):
    """All verdicts on a folder."""

    root: Path
    found: Survey
    verdicts: list[Verdict]

    @property
    def good(self) -> list[Verdict]:
        """Files that can be read."""
        return [verdict for verdict in self.verdicts if verdict.header]

    @property
    def bad(self) -> list[Verdict]:
        """Files that cannot."""
        return [verdict for verdict in self.verdicts if not verdict.header]


def main(settings) -> None:
    """Print the verdicts; raises UserError if a run would refuse the folder."""
    began = time.monotonic()
    check = look_at(Path(settings.source), settings.decode)
    print(report(check, settings.decode, time.monotonic() - began))
    refuse_many_bad(check.root, [verdict.fault for verdict in check.bad], len(check.verdicts), allow_bad=False)


def look_at(root: Path, decode: bool) -> Check:
    """Every picture file of a folder through the gate; raises UserError for a folder that cannot be trained on."""

    def verdict(entry: Entry) -> Verdict:
        try:
            return Verdict(entry, inspect(on_disk(root, entry.file), decode=decode))
        except UnreadableImage as error:
            return Verdict(entry, None, str(error))

    if str(root) in PROCEDURAL:
        raise UserError(f"SOURCE {root} is drawn, and has no files to look at; give a folder of pictures.")
    found = survey(root)
    looked = each(verdict, found.entries)
    return Check(root, found, list(track(looked, f"Looking at {root}", len(found.entries), transient=True)))


def report(check: Check, decode: bool, seconds: float) -> str:
    """What a person should know, the good in sums and the bad by name."""
    how = "every pixel decoded" if decode else "headers and ends; --decode looks at every pixel"
    lines = [f"{check.root}: {len(check.verdicts):,} files in {seconds:.1f} s ({how})."]
    for section in (_good, _classes, _bad, _links, _notes):
        lines += section(check)
    return "\n".join([*lines, f"Fingerprint {listing(check.found.entries)} (names, labels, captions, sizes)"])


def _good(check: Check) -> list[str]:
    headers = [verdict.header for verdict in check.good]
    formats, sizes = Counter(h.format for h in headers), Counter(f"{h.size[0]}x{h.size[1]}" for h in headers)
    return [f"Good {len(headers):,}: {_most(formats)}; {_most(sizes)}"] if headers else []


def _classes(check: Check) -> list[str]:
    labels = Counter(verdict.entry.label for verdict in check.good if verdict.entry.label)
    captions = sum(bool(verdict.entry.text) for verdict in check.good)
    lines = [f"Classes {len(labels):,}: {_most(labels)}"] if labels else ["No classes."]
    return lines + ([f"Captions {captions:,}"] if captions else [])


def _bad(check: Check) -> list[str]:
    if not check.bad:
        return ["Unreadable 0"]
    share = len(check.bad) / len(check.verdicts)
    limit = "more" if share > BAD_SHARE else "not more"
    lines = [f"Unreadable {len(check.bad):,}, {100 * share:.2g} % and {limit} than the {100 * BAD_SHARE:g} % allowed:"]
    return lines + [f"  {verdict.fault}" for verdict in check.bad]


def _links(check: Check) -> list[str]:
    links = check.found.links
    if not links:
        return []
    shown = [f"  {display_name(name)} is {display_name(first)}" for name, first in links[:_MOST_LINKS]]
    rest = [f"  and {len(links) - len(shown):,} more"] if len(links) > len(shown) else []
    return [f"Left out {len(links):,}, links to files that count already:", *shown, *rest]


def _notes(check: Check) -> list[str]:
    sentences = [*notes(check.found), *header_notes([verdict.header for verdict in check.good])]
    return [f"Note: {sentence}" for sentence in sentences]


def _most(counts: Counter) -> str:
    named = ", ".join(f"{display_name(name)} {count:,}" for name, count in counts.most_common(8))
    return named + (f", {len(counts) - 8:,} more" if len(counts) > 8 else "")
