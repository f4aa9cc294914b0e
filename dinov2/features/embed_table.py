"""The table of embeddings on disk: parts as they are done, and one Parquet file of them in the end.

    feats.parquet            id, path, channel, sha, facts of the list, cls[E], pooled[E]; rows in the order of the list
    feats.quarantine.json    scans that were set aside: path, reason, detail
    feats.parts/             key.json (what was asked for), 000012.parquet, ... (a checksum ends each); gone with the last one
    feats.patches/           with patch tokens: a .npz a scan, named after it

A part is a fixed stretch of the list, made by whoever finds it missing and written aside and renamed, so that a run continues
after any kind of end, on any number of processes.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.errors import BadInput
from dinov2.features.embed_rows import FACTS
from dinov2.files import read_json, replacing, to_json, write_json
from dinov2.optional import needed_for

logger = logging.getLogger(__name__)

ROWS_PER_PART = 16
PARTS_PER_GROUP = 64  # of the Parquet file's row groups
META = b"dinov2-3d"
_CHECKSUM_BYTES = 8  # of a part's end
Row = dict[str, Any]


def arrow() -> tuple[Any, Any]:
    """The libraries, imported where they are used.

    Raises:
        BadInput: They are not installed.
    """
    with needed_for("a Parquet file"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow, pyarrow.parquet


def _checksum(content: bytes) -> bytes:
    return f"{zlib.crc32(content):08x}".encode()


def _raise_the_machines(err: Exception, path: Path) -> None:
    """Raise again what is no fault of a file's content: no memory, or what the system refused. Nobody is to remove the file.

    pyarrow's lack of memory is an ArrowException too; its OSErrors of content have no number.
    """
    if isinstance(err, MemoryError):
        raise err
    if isinstance(err, OSError) and err.errno:
        raise BadInput(f"{path}: {err.strerror}: nothing is lost, the same command continues") from err


class UnreadableTable(ValueError):
    """What a table of features says of itself cannot be, or its checksum is another; nothing else of ours is meant."""


def _checked(content: bytes) -> bytes:
    """What a part was before its checksum was added.

    Raises:
        UnreadableTable: It does not match.
    """
    body, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if _checksum(body) != checksum:
        raise UnreadableTable("does not match its checksum")
    return body


def about_table(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """What a table says of itself, from the metadata of its file; empty where it says nothing.

    Raises:
        UnreadableTable: It cannot be read.
    """
    try:
        found = json.loads((metadata or {}).get(META, b"{}"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as err:
        raise UnreadableTable("its metadata is no JSON, or nested too deeply") from err
    if not isinstance(found, dict):
        raise UnreadableTable("its metadata is no mapping")
    return found


class EmbeddingTable:
    """One table and its parts.

    Args:
        output: The Parquet file.
        key: All that its content depends on, plain types.
        num_rows: Of the list.
        width: E.
        has_patches: A column names each scan's file of patch tokens.

    Raises:
        BadInput: No pyarrow, the place cannot be written, or it holds a table or parts of another key.
    """

    def __init__(self, output: Path, key: dict[str, Any], num_rows: int, width: int, has_patches: bool) -> None:
        self.output, self.key = output, key
        self.num_rows = num_rows
        self.num_parts = -(-num_rows // ROWS_PER_PART)
        stem = output.name.removesuffix(".parquet")
        self.parts = output.with_name(f"{stem}.parts")
        self.patches = output.with_name(f"{stem}.patches")
        self.quarantine = output.with_name(f"{stem}.quarantine.json")
        pa, _ = arrow()
        vector = pa.list_(pa.float32(), width)
        columns = {
            "id": pa.string(),
            "path": pa.string(),
            "channel": pa.int32(),
            "sha": pa.string(),
            **{name: pa.string() for name in FACTS},
            "spacing": pa.list_(pa.float64(), 3),
            "cls": vector,
            "pooled": vector,
            **({"patches": pa.string()} if has_patches else {}),
        }
        self._schema = pa.schema(columns)
        self.is_done = self._check_table()
        if not self.is_done:
            self._start_parts()

    def _check_table(self) -> bool:
        """Whether the finished table is there."""
        pa, pq = arrow()
        if not self.output.exists():
            return False
        try:
            found = about_table(pq.read_schema(self.output).metadata)
        except (OSError, UnreadableTable, UnicodeDecodeError, pa.ArrowException) as err:
            _raise_the_machines(err, self.output)
            raise BadInput(f"--output {self.output}: is there and no Parquet file: choose another or remove it") from err
        self._require_same(found.get("key"), self.output)
        return True

    def _start_parts(self) -> None:
        file = self.parts / "key.json"
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            if file.exists():
                self._require_same(read_json(file, remedy=f"remove {self.parts} to begin anew"), self.parts)
            else:
                write_json(file, self.key)
        except OSError as err:
            raise BadInput(f"--output {self.output}: {err.strerror}: choose another place") from err

    def _require_same(self, found: Any, place: Path) -> None:
        """A key that was begun with, against this one."""
        if not isinstance(found, dict):
            raise BadInput(f"{place}: was not written by `dinov2 embed`: choose another --output or remove it")
        other = [k for k in dict.fromkeys((*self.key, *found)) if found.get(k) != self.key.get(k)]
        if other:
            raise BadInput(f"{place}: was made with another {' and '.join(other)}: choose another --output or remove it")

    def rows_of(self, part: int) -> range:
        """Places in the list."""
        return range(part * ROWS_PER_PART, min((part + 1) * ROWS_PER_PART, self.num_rows))

    def part_of(self, row: int) -> int:
        """The part that has a place of the list."""
        return row // ROWS_PER_PART

    def missing(self) -> list[int]:
        """Parts that nobody has made yet."""
        return [part for part in range(self.num_parts) if not self._part(part).exists()]

    def _part(self, part: int) -> Path:
        return self.parts / f"{part:06d}.parquet"

    def write_part(self, part: int, rows: list[Row], set_aside: list[Row]) -> None:
        """Keep a part.

        Args:
            part: Its number.
            rows: Of the table; `cls` and `pooled` float32 arrays [E].
            set_aside: Of the quarantine.

        Raises:
            BadInput: The disk is full.
        """
        pa, pq = arrow()
        columns = [pa.array([row.get(f.name) for row in rows], f.type) for f in self._schema]
        meta = {META: to_json({"set_aside": set_aside})}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, self._schema.with_metadata(meta)), sink)
        content = sink.getvalue().to_pybytes()
        self._replace(self._part(part), lambda path: path.write_bytes(content + _checksum(content)))

    def write_patches(self, name: str, patch: np.ndarray, affine: np.ndarray) -> str:
        """Keep a scan's patch tokens; returns the file's path from the table's folder.

        Raises:
            BadInput: The disk is full.
        """

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, patch=patch, affine=affine)

        self._replace(self.patches / f"{name}.npz", write)
        return f"{self.patches.name}/{name}.npz"

    def _replace(self, path: Path, write: Any) -> None:
        """Write to a name of this process's own, then rename."""
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path, private=True) as temporary:
                write(temporary)
        except OSError as err:
            reason = err.strerror or str(err).splitlines()[0]
            raise BadInput(f"{path}: cannot be written ({reason}): make room; the same command continues") from err

    def assemble(self, about: dict[str, Any], set_aside: list[Row]) -> tuple[int, list[Row]]:
        """Make the table of all parts and remove them; of several processes that try, one does it.

        Args:
            about: Further facts for the table's metadata, plain types.
            set_aside: What was, before the list was made.

        Returns:
            Rows of the table, and all that was set aside.

        Raises:
            BadInput: No scan could be used, a part is damaged, or the disk is full.
        """
        try:
            lock = (self.parts / "lock").open("a")
        except FileNotFoundError:  # another process has just done it
            lock = None
        if lock is not None:
            with lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not self._check_table():
                    self._assemble(about, set_aside)
        _, pq = arrow()
        return pq.read_metadata(self.output).num_rows, read_json(self.quarantine)

    def _assemble(self, about: dict[str, Any], before: list[Row]) -> None:
        """The table comes last: where it is, all is there."""
        _, pq = arrow()
        schema = self._schema.with_metadata({META: to_json({"key": self.key, **about})})

        def write(path: Path) -> None:
            with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
                for group, _ in self._groups():
                    writer.write_table(group.cast(schema))

        bad = [row for _, rows in self._groups() for row in rows]
        self._replace(self.quarantine, lambda path: write_json(path, [*before, *bad]))
        if len(bad) < self.num_rows:
            self._replace(self.output, write)
        shutil.rmtree(self.parts)
        if len(bad) == self.num_rows:
            first = f"{bad[0]['path']}: {bad[0]['detail']}"
            raise BadInput(f"none of the {self.num_rows} scans can be used (listed in {self.quarantine}), such as {first}")

    def _groups(self) -> Iterator[tuple[Any, list[Row]]]:
        """Rows of some parts at a time, and what these set aside."""
        pa, pq = arrow()
        for first in range(0, self.num_parts, PARTS_PER_GROUP):
            tables: list[Any] = []
            set_aside: list[Row] = []
            for part in range(first, min(first + PARTS_PER_GROUP, self.num_parts)):
                path = self._part(part)
                try:
                    content = pa.BufferReader(_checked(path.read_bytes()))
                    tables.append(pq.read_table(content, schema=self._schema))
                    about = about_table(pq.read_schema(content).metadata)
                except (OSError, UnreadableTable, UnicodeDecodeError, pa.ArrowException) as err:
                    _raise_the_machines(err, path)
                    raise BadInput(f"{path}: is damaged: remove it and start the same command again") from err
                if not isinstance(about.get("set_aside"), list):
                    raise BadInput(f"{path}: is damaged: remove it and start the same command again")
                set_aside += about["set_aside"]
            yield pa.concat_tables(tables).combine_chunks(), set_aside
