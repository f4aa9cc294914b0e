"""A table of `dinov2 embed` as retrieval reads it: what it says of scans, where their files are, which rows are searched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.configs.errors import nearest
from dinov2.data.datalist import Entry
from dinov2.data.preprocess import PERCENTILES
from dinov2.errors import BadInput
from dinov2.features.embed_table import UnreadableTable, about_table, arrow
from dinov2.files import path_for_list, path_in_list, user_path
from dinov2.geometry import triple

VECTORS = ("cls", "pooled")
NETWORK = "network (weights or dtype)"  # of the table's key
_NUMBER = re.compile("-?[0-9]{1,18}")


class FeatureTable:
    """One table; its vectors stay on disk.

    Args:
        path: The Parquet file.
        folder: Where the paths in it begin; None: where the table says, else its own folder.

    Attributes:
        about: What it says of itself: `weights`, `dtype`, `percentiles`, ...; empty where it says nothing.
        key: What its features depend on: the network's fingerprint, the view; see `features/embed.py`.
        num_rows: n.

    Raises:
        BadInput: No such table, or none of scans.
    """

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        pa, pq = arrow()
        self.path = path
        if not path.is_file():
            raise BadInput(f"{path}: no such table: give the .parquet that `dinov2 embed` wrote")
        try:
            self._file = pq.ParquetFile(path)
            self.about = about_table(self._file.schema_arrow.metadata)
        except MemoryError:  # pyarrow's is an ArrowException too, and no fault of the file
            raise
        except (OSError, UnreadableTable, UnicodeDecodeError, pa.ArrowException) as err:  # names of columns are text
            why = (isinstance(err, OSError) and err.errno and err.strerror) or "is no Parquet file"
            raise BadInput(f"{path}: {why}: give the one that `dinov2 embed` wrote") from err
        names = self._file.schema_arrow.names
        missing = [name for name in ("id", "path") if name not in names]
        if missing:
            raise BadInput(f"{path}: has no column {missing[0]!r}: give the table that `dinov2 embed` wrote")
        self.key: dict[str, Any] = self.about.get("key", {})
        self.num_rows: int = self._file.metadata.num_rows
        self._vectors = [name for name in VECTORS if name in names]
        self._folder = folder or Path(path_in_list(self.about.get("folder", "."), path.absolute().parent))

    @cached_property
    def _facts(self) -> Any:
        """All columns but the vectors."""
        names = [name for name in self._file.schema_arrow.names if name not in VECTORS]
        return self._file.read(columns=names)

    @property
    def columns(self) -> list[str]:
        """What a scan can be chosen by."""
        return [name for name in self._facts.column_names if name not in ("spacing", "patches")]

    def facts(self, row: int) -> dict[str, Any]:
        """All that the table says of a scan besides its vectors."""
        return self._facts.slice(row, 1).to_pylist()[0]

    def values(self, column: str) -> np.ndarray:
        """[n] of a column as text, None where it says nothing.

        Raises:
            BadInput: There is no such column.
        """
        if column not in self.columns:
            raise BadInput(
                f"{self.path}: no column {column!r}{nearest(column, self.columns)}: it has {', '.join(self.columns)}"
            )
        values = self._facts[column].to_pylist()
        return np.array([None if value is None else str(value) for value in values], dtype=object)

    def vectors(self, column: str) -> Iterator[np.ndarray]:
        """The rows' vectors in order, [some, E] float32 at a time.

        Raises:
            BadInput: There are none, or not of one length.
        """
        if column not in self._vectors:
            raise BadInput(f"{self.path}: has no column {column!r} of features: give the table that `dinov2 embed` wrote")
        width = None
        for group in range(self._file.num_row_groups):
            rows = self._file.read_row_group(group, columns=[column]).column(0).combine_chunks()
            if len(rows) == 0:
                continue
            values = rows.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
            width = width or len(values) // len(rows)
            if width == 0 or len(values) != width * len(rows):
                raise BadInput(
                    f"{self.path}: its column {column!r} has rows without features, or of other lengths: embed again"
                )
            yield values.reshape(-1, width)

    def find(self, query: str) -> int | None:
        """The row that a number, path or id names; None where it is none of the table's.

        Raises:
            BadInput: A number beyond the table, or a name of several rows.
        """
        if _NUMBER.fullmatch(query):
            if not 0 <= int(query) < self.num_rows:
                raise BadInput(f"--query {query}: {self.path} has the rows 0 to {self.num_rows - 1}: give one of these")
            return int(query)
        absolute = os.path.abspath(user_path(query))
        names = {"path": (query, absolute, path_for_list(absolute, self._folder)), "id": (query,)}
        for column, wanted in names.items():
            rows = [row for row, value in enumerate(self.values(column)) if value in wanted]
            if len(rows) > 1:
                numbers = ", ".join(map(str, rows[:8]))
                raise BadInput(f"--query {query}: {len(rows)} rows have this {column}: give a number, such as {numbers}")
            if rows:
                return rows[0]
        return None

    def entry(self, row: int) -> Entry:
        """A row's scan as a list would have it, path absolute."""
        facts = self.facts(row)
        channel, spacing = facts.get("channel"), facts.get("spacing")
        return Entry(
            path_in_list(facts["path"], self._folder),
            (),
            spacing_mm=triple(spacing) if spacing else None,
            axes=None if channel is None else "xyzc",
            channel=channel,
        )

    def patches(self, row: int) -> Path:
        """The file of a scan's patch tokens.

        Raises:
            BadInput: The table was made without them.
        """
        name = self.facts(row).get("patches")
        if name is None:
            raise BadInput(f"{self.path}: has no patch tokens, which --at needs: make it by `dinov2 embed --patch-tokens`")
        return self.path.absolute().parent / name

    @property
    def weights(self) -> str | None:
        """Where the weights are that it was made with: a path is from its folder; None where it does not say."""
        name = self.about.get("weights")
        beside = path_in_list(name, self.path.absolute().parent) if name else ""
        return beside if os.path.exists(beside) else name

    @property
    def percentiles(self) -> tuple[float, float]:
        """Of intensities, that the network saw as -1 and 1."""
        low, high = self.about.get("percentiles", PERCENTILES)
        return low, high


def rows_left(table: FeatureTable, where: Sequence[str], exclude_same: Sequence[str], query_row: int | None) -> np.ndarray:
    """The rows that a search may give, rising.

    Args:
        where: `column=value` each; all must hold.
        exclude_same: Columns whose value must be another than the query's; a scan that does not say its own stays.
        query_row: Itself is never given; None: the query is no row.

    Raises:
        BadInput: An unknown column, a value that the query does not have, or no row is left.
    """
    left = np.ones(table.num_rows, bool)
    if query_row is not None:
        left[query_row] = False
    for condition in where:
        column, equals, value = condition.partition("=")
        if not equals:
            raise BadInput(f"--where {condition}: write it as column=value, such as modality=CT")
        values = table.values(column)
        left &= values == value
        if not left.any():
            hint = nearest(value, sorted({v for v in values if v is not None}))
            raise BadInput(f"--where {condition}: no scan is left{hint}: leave it out or ask for another")
    for column in exclude_same:
        values = table.values(column)
        own = None if query_row is None else values[query_row]
        if own is None:
            what = "no row of the table" if query_row is None else f"row {query_row}, which has none"
            raise BadInput(f"--exclude-same {column}: the query is {what}, so its {column} is not known: leave it out")
        left &= values != own
        if not left.any():
            raise BadInput(f"--exclude-same {column}: no scan is left, all others have {own!r} too: leave it out")
    if not left.any():
        raise BadInput(f"{table.path}: has no scan besides the query")
    return np.flatnonzero(left)


def label(facts: Mapping[str, Any]) -> str:
    """What a scan is called."""
    return str(facts["id"] or facts["path"])
