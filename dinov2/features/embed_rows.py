"""What the table of embeddings says of a scan besides its features: its name, where it is, and what the list knows of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinov2.data.datalist import Datalist, Entry
from dinov2.data.names import names_apart
from dinov2.files import path_for_list

FACTS = ("patient", "modality", "organ", "series")  # keys of a list's entries that are columns
_NAME_BYTES = 200  # of a file's name at most, which may be 255 with what is added
_NOT_IN_NAMES = re.compile(r"[/\\\x00-\x1f]")


class ListedScans:
    """The scans of a list.

    Args:
        datalist: As read, paths absolute.
    """

    def __init__(self, datalist: Datalist) -> None:
        self.entries = datalist.entries
        self._folder = Path(datalist.path).absolute().parent
        self._ids = scan_ids(self.entries)
        self._files = file_names(self._ids)

    def row(self, place: int) -> dict[str, Any]:
        """The columns of a scan that its entry tells; None where it does not."""
        entry = self.entries[place]
        path = path_for_list(entry.image, self._folder)
        facts = {name: entry.extra.get(name) for name in FACTS}
        known = {name: None if value is None else str(value) for name, value in facts.items()}
        return {"id": self._ids[place], "path": path, "channel": entry.channel, **known}

    def file_name(self, place: int) -> str:
        """Of a file of its own, without ending; no other scan has it."""
        return self._files[place]


def scan_ids(entries: Sequence[Entry]) -> list[str]:
    """The names of scans: the entry's `id` or `case`, else of its path; of a file's channel with the channel's number."""
    images = list(dict.fromkeys(e.image for e in entries))
    names = dict(zip(images, names_apart([None] * len(images), [(image,) for image in images]), strict=True))
    numbers = ("" if e.channel is None else f"_{e.channel:04}" for e in entries)
    return [str(e.extra.get("id") or e.extra.get("case") or names[e.image] + n) for e, n in zip(entries, numbers, strict=True)]


def file_names(ids: Sequence[str]) -> list[str]:
    """Names that a file may have, each another: a second one of a name is NAME_2."""
    taken: set[str] = set()
    counts: Counter[str] = Counter()
    found = []
    for text in ids:
        plain = _NOT_IN_NAMES.sub("_", text).encode("utf-8", "replace")[-_NAME_BYTES:].decode("utf-8", "ignore")
        name = plain
        while name in taken:
            counts[plain] += 1
            name = f"{plain}_{counts[plain] + 1}"
        taken.add(name)
        found.append(name)
    return found
