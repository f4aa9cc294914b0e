"""Unit vectors of a table in float16, memory-mapped, and the nearest of them.

    feats.index/cls-<hash>.npy     [n, E] float16; the name has the hash of the table's bytes, so that it is never stale
    feats.index/table.json         that hash, and the size and time of the table that it was reckoned from

Made when it is first needed, written aside and renamed. The distance is 1 - cosine, found as half of the squared distance of
unit vectors, so that float16's rounding (2^-11 of each number) stays small beside it, however similar all scans are.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.errors import BadInput
from dinov2.features.retrieval.table import FeatureTable
from dinov2.files import read_json, replacing, write_json

logger = logging.getLogger(__name__)

FORMAT = 1  # of the index; raised with what it holds
ROWS_PER_BLOCK = 16_384  # that are in float32 at a time


def open_index(table: FeatureTable, column: str) -> np.ndarray:
    """[n, E] float16 unit vectors of a column, made and kept beside the table where they are not there.

    Raises:
        BadInput: The table has no such features, or rows of it cannot be used.
    """
    folder = table.path.with_name(f"{table.path.name.removesuffix('.parquet')}.index")
    file = folder / f"{column}-{_content_key(table.path, folder)[:32]}.npy"
    try:
        found = np.load(file, mmap_mode="r")
        if found.dtype == np.float16 and found.shape[0] == table.num_rows:
            return found
    except (OSError, ValueError):  # not there, or half of it
        pass
    vectors = _unit_vectors(table, column)
    try:
        folder.mkdir(exist_ok=True)
        with replacing(file, private=True) as temporary:
            np.save(temporary, vectors)
        for other in folder.glob(f"{column}-*.npy"):
            if other != file:
                other.unlink(missing_ok=True)
    except OSError as err:
        logger.warning("%s: the index cannot be kept (%s), and is made again each time", folder, err.strerror or err)
        return vectors
    return np.load(file, mmap_mode="r")


def _content_key(path: Path, folder: Path) -> str:
    """A hash of the table's bytes; they are read again only where its size or time have changed."""
    state = path.stat()
    stamp = {"format": FORMAT, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    memory = folder / "table.json"
    try:
        known: Any = read_json(memory)
    except BadInput:  # none yet, or damaged
        known = None
    if isinstance(known, dict) and isinstance(known.get("sha256"), str) and {**stamp, "sha256": known["sha256"]} == known:
        return known["sha256"]
    digest = hashlib.sha256(f"{FORMAT}".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    sha = digest.hexdigest()
    try:
        folder.mkdir(exist_ok=True)
        write_json(memory, {**stamp, "sha256": sha})
    except OSError:  # said where the index is kept
        pass
    return sha


def _unit_vectors(table: FeatureTable, column: str) -> np.ndarray:
    """[n, E] float16.

    Raises:
        BadInput: A row without direction: not finite, or all zero.
    """
    parts: list[np.ndarray] = []
    first = 0
    for values in table.vectors(column):
        length = np.linalg.norm(values, axis=1, keepdims=True)
        bad = np.flatnonzero(~(np.isfinite(length) & (length > 0)))
        if len(bad):
            row = first + int(bad[0])
            name = table.facts(row)["id"]
            raise BadInput(
                f"{table.path}: the features of row {row} ({name}) are not finite or all zero: embed the scans again"
            )
        parts.append((values / length).astype(np.float16))
        first += len(values)
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float16)


def neighbours(index: np.ndarray, query: np.ndarray, k: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar of some rows, nearest first.

    Args:
        index: [n, E] float16 unit vectors, on disk or in memory.
        query: [E], of any length.
        k: How many; all rows where there are fewer.
        rows: Which may be given, rising.

    Returns:
        Their numbers [k] and distances [k], 1 - cosine.
    """
    from sklearn.neighbors import NearestNeighbors

    unit = (query.astype(np.float64) / np.linalg.norm(query.astype(np.float64)))[None].astype(np.float32)
    found: list[np.ndarray] = []
    distances: list[np.ndarray] = []
    for first in range(0, len(rows), ROWS_PER_BLOCK):
        some = rows[first : first + ROWS_PER_BLOCK]
        is_run = some[-1] - some[0] == len(some) - 1  # without gaps no copy in float16 is made
        block = (index[some[0] : some[-1] + 1] if is_run else index[some]).astype(np.float32)
        search = NearestNeighbors(n_neighbors=min(k, len(some)), algorithm="brute").fit(block)
        distance, place = search.kneighbors(unit)
        found.append(some[place[0]])
        distances.append(distance[0] ** 2 / 2)
    every, distance = np.concatenate(found), np.concatenate(distances)
    nearest = np.lexsort((every, distance))[:k]
    return every[nearest], distance[nearest]
