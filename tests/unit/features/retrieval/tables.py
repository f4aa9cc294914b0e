"""Small tables of features, as `dinov2 embed` writes them, without a network."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 64


def write_table(path: Path, vectors: np.ndarray, about: dict[str, Any] | None = None, **columns: list[Any]) -> Path:
    """A table of vectors [n, E] whose scans are `0.nii`, `1.nii`, ... beside it."""
    n, width = vectors.shape
    values = {
        "id": pa.array([f"scan {i}" for i in range(n)]),
        "path": pa.array([f"{i}.nii" for i in range(n)]),
        "channel": pa.array([None] * n, pa.int32()),
        "spacing": pa.array([[1.0, 1.0, 2.0]] * n, pa.list_(pa.float64(), 3)),
        **{name: pa.array(given, pa.string()) for name, given in columns.items()},
    }
    for name, shown in (("cls", vectors), ("pooled", -vectors)):
        values[name] = pa.FixedSizeListArray.from_arrays(pa.array(shown.astype(np.float32).ravel()), width)
    table = pa.table(values).replace_schema_metadata({b"dinov2-3d": json.dumps(about or {})})
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP)
    return path


def write_scan(path: Path, shape: tuple[int, int, int] = (12, 10, 8), affine: np.ndarray | None = None, seed: int = 0) -> None:
    """Noise in a NIfTI file."""
    voxels = np.random.default_rng(seed).integers(1, 900, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0]) if affine is None else affine), path)


def hits(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
