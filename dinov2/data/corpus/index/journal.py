"""What an index has seen, a line per unit beside its list: continued after a stop, merged from shards, kept for the next run.

Only a unit's stamp and the place of its line are held in memory, so that 100,000 volumes take no more than their names do.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dinov2.data.corpus.index.examine import PASSING, Row
from dinov2.errors import BadInput
from dinov2.files import from_json, lock, replacing, to_json

SUFFIX = ".index.jsonl"
FORMAT = "dinov2-3d index 1"
_CHECKSUM = b', "crc32": '

logger = logging.getLogger(__name__)


def journal_path(output: Path) -> Path:
    """Beside the list: `list.json` has `list.index.jsonl`."""
    return output.with_name(output.name.removesuffix(".json") + SUFFIX)


class Journal:
    """The journal of one list, of one process at a time.

    Args:
        path: Made where it is not there. One of other options is begun anew.
        options: What the rows depend on; written in the first line.

    Raises:
        BadInput: It cannot be written, or another process has it.
    """

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path, self.options = path, options
        self.was_of_other_options = False
        self._lines: dict[str, tuple[str, int]] = {}  # unit -> stamp (empty: to be looked at again), place of its line
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)  # so that a full disk shows at the line that does not fit
        except OSError as err:
            raise BadInput(f"{path}: {err.strerror}: choose another --output") from err
        if not lock(self._file):
            self._file.close()
            raise BadInput(f"{path}: another index writes it: wait for it or choose another --output")
        with path.open("rb") as earlier:
            self._continue(earlier)
        self._reader = path.open("rb")  # not the one above: what that holds in its buffer may have been cut off

    def _continue(self, earlier: BinaryIO) -> None:
        """Take up the lines that are there; a last one cut short by a kill goes."""
        if _header(earlier.readline()) != self.options:
            self.was_of_other_options = os.fstat(self._file.fileno()).st_size > 0
            self._file.truncate(0)
            self._append({"format": FORMAT, "options": self.options})
            return
        place = earlier.tell()
        for number, line in enumerate(earlier, 2):
            record = _parsed(line)
            if record is None:
                if line.endswith(b"\n"):
                    what = "%s, line %d: is damaged: what it and the lines after it had is examined again"
                    logger.warning(what, self.path, number)
                break
            self._lines[record["unit"]] = (_kept_stamp(record["stamp"], record["rows"]), place)
            place += len(line)
        self._file.truncate(place)

    def _append(self, record: dict[str, Any]) -> int:
        """Add a line; returns where it begins.

        Raises:
            BadInput: The disk is full.
        """
        line = _line(record)
        try:
            place = self._file.seek(0, os.SEEK_END)
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as err:
            raise BadInput(f"{self.path}: {err.strerror}: make room; the same command continues") from err
        return place

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._reader.close()

    def knows(self, unit: str, stamp: str) -> bool:
        return self._lines.get(unit, ("",))[0] == stamp

    def doubts(self, unit: str) -> bool:
        """Whether it was set aside for a reason that may be over."""
        return unit in self._lines and not self._lines[unit][0]

    def add(self, unit: str, stamp: str, rows: list[Row]) -> None:
        """Append a unit's rows.

        Raises:
            BadInput: The disk is full.
        """
        place = self._append({"unit": unit, "stamp": stamp, "rows": rows})
        self._lines[unit] = (_kept_stamp(stamp, rows), place)

    def keep_only(self, units: set[str]) -> None:
        """Forget what is not there any more."""
        self._lines = {unit: line for unit, line in self._lines.items() if unit in units}

    def rows(self) -> Iterator[Row]:
        """All rows by the order of their units' names, read line by line."""
        for unit in sorted(self._lines):
            self._reader.seek(self._lines[unit][1])
            yield from json.loads(self._reader.readline())["rows"]

    def compact(self) -> None:
        """Write it anew in order, without lines that later ones replaced; the lock stays with this process."""
        try:
            with replacing(self.path) as temporary, temporary.open("wb") as file:
                file.write(_line({"format": FORMAT, "options": self.options}))
                for unit in sorted(self._lines):
                    self._reader.seek(self._lines[unit][1])
                    file.write(self._reader.readline())
        except OSError as err:
            raise BadInput(f"{self.path}: {err.strerror}: make room; the same command continues") from err


def read_journal(path: Path) -> tuple[dict[str, Any], Iterator[tuple[str, str, list[Row]]]]:
    """Options and records of another list's journal.

    Raises:
        BadInput: It is not there, or no journal.
    """
    try:
        with path.open("rb") as file:
            options = _header(file.readline())
    except OSError as err:
        raise BadInput(f"{path}: {err.strerror}: it is written beside a shard's list, and needed to merge it") from err
    if options is None:
        raise BadInput(f"{path}: is no journal of `dinov2 index`")
    return options, _records(path)


def _kept_stamp(stamp: str, rows: list[Row]) -> str:
    return "" if any(row.get("reason") in PASSING for row in rows) else stamp


def _records(path: Path) -> Iterator[tuple[str, str, list[Row]]]:
    with path.open("rb") as file:
        file.readline()
        for number, line in enumerate(file, 2):
            record = _parsed(line)
            if record is None:
                what = "damaged" if line.endswith(b"\n") else "cut short"
                raise BadInput(f"{path}, line {number}: is {what}: start its shard again, which examines what is missing")
            yield record["unit"], record["stamp"], record["rows"]


def _line(record: dict[str, Any]) -> bytes:
    """A record and its checksum."""
    body = to_json(record).encode()
    return body[:-1] + _CHECKSUM + f'"{zlib.crc32(body):08x}"}}\n'.encode()


def _content(line: bytes) -> Any:
    """What a line holds; None for one that was cut short or is not as it was written."""
    if not line.endswith(b"\n"):
        return None
    try:
        content = from_json(line)
        checksum = content.pop("crc32", None) if isinstance(content, dict) else None
        if checksum is not None and checksum != f"{zlib.crc32(line[: line.rindex(_CHECKSUM)] + b'}'):08x}":
            return None
    except ValueError:
        return None
    return content


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A unit's record; None for anything else."""
    record = _content(line)
    if not isinstance(record, dict) or record.keys() != {"unit", "stamp", "rows"}:
        return None
    is_record = isinstance(record["unit"], str) and isinstance(record["stamp"], str) and isinstance(record["rows"], list)
    return record if is_record and all(isinstance(row, dict) for row in record["rows"]) else None


def _header(line: bytes) -> dict[str, Any] | None:
    record = _content(line)
    return record.get("options") if isinstance(record, dict) and record.get("format") == FORMAT else None
