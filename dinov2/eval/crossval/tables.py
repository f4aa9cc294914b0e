"""The two tables of a probe: features by `dinov2 embed`, and people by whoever made a spreadsheet."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.configs.errors import nearest
from dinov2.data.downstream.split import is_empty_cell
from dinov2.errors import BadInput
from dinov2.features.embed_table import UnreadableTable, about_table, arrow
from dinov2.files import path_in_list, read_text

PARTS = ("cls", "pooled")  # of the features; with + side by side
_DELIMITERS = ",;\t"
_VIEW = ("mode", "size", "overlap")  # of an embedding's key


@dataclass(frozen=True)
class Embeddings:
    """A table of `dinov2 embed`, rows in an order of their own, not the file's.

    Attributes:
        path: The file.
        sha256: Of its bytes.
        about: What it says of its list, view and network.
        ids: Of each row.
        scans: Absolute paths.
        patients: As the list said; None where it did not.
        shas: Of the voxels.
        features: [rows, E] float64 by part (`PARTS`).
    """

    path: Path
    sha256: str
    about: dict[str, Any]
    ids: list[str]
    scans: list[str]
    patients: list[str | None]
    shas: list[str]
    features: dict[str, np.ndarray]

    @property
    def view(self) -> dict[str, Any]:
        key = self.about["key"]
        return {**{name: key.get(name) for name in _VIEW}, **({"spacing": key["spacing"]} if key.get("spacing") else {})}

    @property
    def network(self) -> str:
        """Fingerprint of weights, preprocessing and dtype."""
        return str(self.about["key"].get("network (weights or dtype)"))

    def columns(self, parts: str) -> np.ndarray:
        """Features [rows, F] of `cls`, `pooled` or `cls+pooled`."""
        return np.concatenate([self.features[part] for part in parts.split("+")], axis=1)


def _holds_numbers(kind: Any) -> bool:
    """Whether a column's type is lists of floats, of one length or several."""
    types = arrow()[0].types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list and types.is_floating(kind.value_type))


def read_embeddings(path: Path) -> Embeddings:
    """A table of features.

    Raises:
        BadInput: Another kind of file, or a row whose features are not finite.
    """
    pa, pq = arrow()
    try:
        content = path.read_bytes()
        table = pq.read_table(pa.BufferReader(content))
        table.validate(full=True)  # of damaged text, too, which would be met below
        found = set(table.column_names)
        about = about_table(table.schema.metadata)
    except OSError as err:
        raise BadInput(f"{path}: {err.strerror or 'no Parquet file'}: give the table of `dinov2 embed`") from err
    except MemoryError:  # pyarrow's is an ArrowException too, and no fault of the file
        raise
    except (UnreadableTable, UnicodeDecodeError, pa.ArrowException) as err:
        raise BadInput(f"{path}: no Parquet file: give the table of `dinov2 embed`") from err
    names = ["id", "path", "channel", "patient", "sha", *PARTS]
    if (
        not isinstance(about.get("key"), dict)
        or not set(names) <= found
        or not all(_holds_numbers(table[p].type) for p in PARTS)
    ):
        raise BadInput(f"{path}: a Parquet file of another kind: give the table of `dinov2 embed`")
    rows = table.select(names[:5]).to_pylist()
    order = sorted(range(len(rows)), key=lambda i: [str(rows[i][name]) for name in names[:3]])
    vectors = {p: table[p].to_pylist() for p in PARTS}
    if any(len({len(v) if isinstance(v, list) else -1 for v in each}) > 1 for each in vectors.values()):
        raise BadInput(f"{path}: is damaged, its rows of features differ in length: embed again")
    features = {p: np.array(each, float).reshape(len(rows), -1)[order] for p, each in vectors.items()}
    rows = [rows[i] for i in order]
    for part, values in features.items():
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            what = f"{part} of {len(bad)} of {len(rows)} rows is not finite, such as {rows[bad[0]]['id']}"
            raise BadInput(f"{path}: {what}: embed again, in fp32 or with other weights")
    return Embeddings(
        path,
        hashlib.sha256(content).hexdigest(),
        about,
        [str(row["id"]) for row in rows],
        [path_in_list(str(row["path"]), path.parent) for row in rows],
        [row["patient"] for row in rows],
        [str(row["sha"]) for row in rows],
        features,
    )


@dataclass(frozen=True)
class People:
    """A table of text.

    Attributes:
        path: The file.
        columns: Names of the first line.
        lines: Cells by column, stripped; of each of `numbers`.
        numbers: Where each begins in the file, from 1.
        has_decimal_commas: Whether 31,5 is a number there.
    """

    path: Path
    columns: list[str]
    lines: list[dict[str, str]]
    numbers: list[int]
    has_decimal_commas: bool

    def require(self, column: str, flag: str) -> str:
        """A column's name, if it is there.

        Raises:
            BadInput: It is not; the nearest one is named.
        """
        if column not in self.columns:
            guess = nearest(column, self.columns)
            raise BadInput(f"{flag} {column}: {self.path} has no such column{guess}: it has {', '.join(self.columns)}")
        return column

    def where(self, line: int) -> str:
        return f"{self.path}, line {self.numbers[line]}"

    def value(self, line: int, column: str) -> str:
        """A cell that has to have a value.

        Raises:
            BadInput: It has none.
        """
        cell = self.lines[line][column]
        if is_empty_cell(cell):
            found = f"is {cell}, no value" if cell else "is empty"
            raise BadInput(f"{self.where(line)}: {column} {found}: complete it or remove the line")
        return cell

    def number(self, cell: str) -> float | None:
        """What a cell's text is as a number, if it is one."""
        try:
            return float(cell.replace(",", ".") if self.has_decimal_commas else cell)
        except ValueError:
            return None


def read_people(path: Path) -> People:
    """A CSV or TSV file: commas, semicolons or tabs, quotes, with a byte order mark or without.

    Raises:
        BadInput: It cannot be read, or has no lines, no column names, or one twice.
    """
    text = read_text(path, f"--table {path}")
    first = re.split(r"\r\n|\r|\n", text, maxsplit=1)[0]
    delimiter = max(_DELIMITERS, key=lambda d: len(next(csv.reader([first], delimiter=d), [])))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        columns = [name.strip() for name in next(reader, [])]
        found = [(number, cells) for cells in reader if any(map(str.strip, cells)) for number in [reader.line_num]]
    except csv.Error as err:
        raise BadInput(f"--table {path}, line {reader.line_num}: cannot be read: {err}") from err
    twice = [name for name in columns if columns.count(name) > 1]
    if not found or not any(columns) or twice:
        what = f"the column {twice[0]!r} comes twice" if twice else "no lines below a first line of column names"
        raise BadInput(f"--table {path}: {what}: give a CSV or TSV file with a line a person or scan")
    for number, cells in found:
        if len(cells) > len(columns):
            raise BadInput(f"--table {path}, line {number}: {len(cells)} cells, the first line has {len(columns)}: quote it")
    lines = [dict(zip(columns, map(str.strip, cells + [""] * (len(columns) - len(cells))), strict=True)) for _, cells in found]
    return People(path, columns, lines, [number for number, _ in found], delimiter == ";")
