"""One preprocessed volume as a file: magic, JSON header, 16-bit voxels, checksum. No pickle.

    8 bytes   magic `DINOVOL1`
    4 bytes   length of the header, little-endian
    n bytes   header, JSON, padded with blanks so that the voxels start at a multiple of 64
    ...       voxels: int16 little-endian in C order, or slabs of them along H, each compressed by blosc2
    4 bytes   CRC-32 of everything before, little-endian

Voxels that compression makes clearly smaller are compressed (LZ4 after a byte shuffle); others are stored as they are and
mapped, not read, so that all loader processes share one copy in the page cache (docs/decisions/003-cache-format.md).
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dinov2.data.preprocess import Volume
from dinov2.geometry import triple

MAGIC = b"DINOVOL1"
ALIGNMENT = 64
SLAB_BYTES = 2**20  # about; small enough to stay in cache, large enough to compress well
WORTH_IT = 0.9  # of the raw size, above which voxels stay uncompressed
_LENGTH, _CRC = 4, 4


class DamagedItem(ValueError):
    """A cache file that is not what was written; the message says how."""


FileState = tuple[int, int, int]  # inode, size and time of change: another one is another content


@dataclass(frozen=True)
class Item:
    """An opened cache file whose checksum holds."""

    header: dict[str, Any]
    payload: memoryview
    state: FileState

    def volume(self) -> Volume:
        """The volume; compressed voxels are decompressed, others mapped copy-on-write.

        Raises:
            DamagedItem: Compressed voxels without blosc2 installed.
        """
        h = self.header
        shape = tuple(h["shape"])
        if h["slabs"] is None:
            voxels = np.frombuffer(self.payload, np.dtype("<i2"), int(np.prod(shape))).reshape(shape)
        else:
            voxels = _decompress(self.payload, shape, h["rows"], h["slabs"])
        box = triple(slice(a, b) for a, b in h["box"])
        return Volume(voxels[None], triple(h["spacing_mm"]), h["moved_axis"], box)


def encode(volume: Volume, source: dict[str, Any]) -> bytes:
    """The file's bytes.

    Args:
        volume: What to keep.
        source: What it was made from, JSON types: kept in the header.
    """
    voxels = volume.stored[0].astype("<i2", copy=False)
    rows = max(1, SLAB_BYTES // (voxels[0].nbytes or 1))
    slabs = _compress(voxels, rows)
    header = {
        "shape": list(voxels.shape),
        "spacing_mm": list(volume.spacing_mm),
        "moved_axis": volume.moved_axis,
        "box": [[s.start, s.stop] for s in volume.box],
        "rows": rows,
        "slabs": None if slabs is None else [len(s) for s in slabs],
        "source": source,
    }
    text = json.dumps(header).encode()
    text += b" " * (-(len(MAGIC) + _LENGTH + len(text)) % ALIGNMENT)
    parts = [MAGIC, len(text).to_bytes(_LENGTH, "little"), text, *([voxels.tobytes()] if slabs is None else slabs)]
    body = b"".join(parts)
    return body + zlib.crc32(body).to_bytes(_CRC, "little")


def open_item(path: Path, check: bool = True, checked: FileState | None = None) -> Item:
    """Open a file, by default reading all of it against its checksum.

    Args:
        path: Of the file.
        check: False leaves the checksum alone.
        checked: State of the file when its checksum was found to hold: it is not looked at again while that is the same.

    Raises:
        FileNotFoundError: There is none.
        DamagedItem: Truncated, changed, or not such a file.
    """
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        state = found.st_ino, found.st_size, found.st_mtime_ns
        try:
            buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        except ValueError as err:
            raise DamagedItem("is empty") from err
    if bytes(buffer[: len(MAGIC)]) != MAGIC:
        raise DamagedItem("is not a cached volume of this version")
    if check and state != checked and zlib.crc32(buffer[:-_CRC]) != int.from_bytes(buffer[-_CRC:], "little"):
        raise DamagedItem("does not match its checksum (truncated or changed)")
    start = len(MAGIC) + _LENGTH
    stop = start + int.from_bytes(buffer[len(MAGIC) : start], "little")
    try:
        header = json.loads(bytes(buffer[start:stop]))
    except ValueError as err:
        raise DamagedItem("has no readable header") from err
    return Item(header, buffer[stop:-_CRC], state)


def _blosc2() -> ModuleType | None:
    """blosc2, where it is installed; imported at its first use."""
    try:
        import blosc2
    except ImportError:
        return None
    return blosc2


def _compress(voxels: np.ndarray, rows: int) -> list[bytes] | None:
    """Slabs of `rows` planes, or None where compression does not pay, or blosc2 is not installed."""
    blosc2 = _blosc2()
    if blosc2 is None:
        return None
    how = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "typesize": 2, "nthreads": 1}
    slabs = [blosc2.compress2(np.ascontiguousarray(voxels[i : i + rows]), **how) for i in range(0, len(voxels), rows)]
    return slabs if sum(map(len, slabs)) < WORTH_IT * voxels.nbytes else None


def _decompress(payload: memoryview, shape: tuple[int, ...], rows: int, slabs: list[int]) -> np.ndarray:
    blosc2 = _blosc2()
    if blosc2 is None:
        raise DamagedItem("is compressed, and blosc2 is not installed (pip install blosc2)")
    voxels = np.empty(shape, np.dtype("<i2"))
    at = 0
    for i, length in enumerate(slabs):
        out = voxels[i * rows : (i + 1) * rows].data.cast("B")
        blosc2.decompress2(payload[at : at + length], dst=out, nthreads=1)
        at += length
    return voxels
