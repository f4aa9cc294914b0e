"""A prepared scan at another spacing: anti-aliased where it becomes coarser, its affine kept true.

C channels, n voxels of an axis before and m after.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from dinov2.data.preprocess import INT16_SCALE, to_16_bits
from dinov2.data.volumes.grids import SAME_SPACING
from dinov2.errors import BadInput
from dinov2.features.scans import Scan
from dinov2.files import is_number
from dinov2.geometry import Spacing, triple

NATIVE = "native"
MOST_VOXELS = 2**31  # of a resampled scan: a spacing in metres, or a slip of the decimal point


def spacing_of(value: Any) -> Spacing | None:
    """`native` (None), one distance in mm, or three (the two axes of a slice, then across slices).

    Args:
        value: A word (`native`, `1.5`, `1,1,2.5`), a number, or a sequence of three.

    Raises:
        BadInput: None of these.
    """
    if value is None or value == NATIVE:
        return None
    try:
        parts = value.split(",") if isinstance(value, str) else [value] if is_number(value) else list(value)
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError) as err:
        raise BadInput(f"spacing {value!r}: give native, a distance in mm, or three (1,1,2.5)") from err
    if len(numbers) not in (1, 3) or not all(np.isfinite(n) and n > 0 for n in numbers):
        raise BadInput(f"spacing {value!r}: give native, a distance in mm above 0, or three (1,1,2.5)")
    return triple(numbers if len(numbers) == 3 else numbers * 3)


def resampled(scan: Scan, spacing_mm: Spacing | None) -> Scan:
    """A scan at a spacing; the same object where it has that already, or none is asked for.

    It comes after the intensities were mapped and the background cut off, so that these do not depend on it, and asks for
    nothing but voxels.

    Raises:
        BadInput: More voxels than any network takes.
    """
    if spacing_mm is None:
        return scan
    if all(step == 1 for step in _steps(scan.affine, spacing_mm)):
        return scan
    values, affine = resample(scan.voxels, spacing_mm, scan.affine, scan.name)
    return dataclasses.replace(scan, voxels=to_16_bits(np.clip(values * np.float32(INT16_SCALE), -1, 1)), affine=affine)


def resample(values: np.ndarray, spacing_mm: Spacing, affine: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Voxels at a spacing, around the same middle.

    Args:
        values: [C, H, W, D].
        spacing_mm: Along H, W, D; an axis that has it already is left as it is.
        affine: [4, 4] voxel -> mm.
        name: Of the scan, for messages.

    Returns:
        [C, H', W', D'] float32 and its affine.

    Raises:
        BadInput: Too many voxels.
    """
    steps = _steps(affine, spacing_mm)
    sizes = [max(1, round(n / step)) for n, step in zip(values.shape[1:], steps, strict=True)]
    if np.prod([float(n) for n in sizes]) > MOST_VOXELS:
        raise BadInput(f"{name}: at this spacing it has {' x '.join(map(str, sizes))} voxels: use a larger spacing (mm)")
    place = np.diag([*steps, 1.0])
    values = values.astype(np.float32)
    for axis, (m, step) in enumerate(zip(sizes, steps, strict=True)):
        n = values.shape[1 + axis]
        place[axis, 3] = start = ((n - 1) - (m - 1) * step) / 2
        if step != 1:
            front = np.moveaxis(values, 1 + axis, 0)
            mixed = _weights(n, m, start, step) @ np.ascontiguousarray(front).reshape(n, -1)
            values = np.moveaxis(mixed.reshape(m, *front.shape[1:]), 0, 1 + axis)
    return values, affine @ place


def _steps(affine: np.ndarray, spacing_mm: Spacing) -> list[float]:
    """Distance of new voxels in old ones, along each axis; exactly 1 where nothing is resampled."""
    own = np.linalg.norm(affine[:3, :3], axis=0)
    steps = (wanted / float(have) for wanted, have in zip(spacing_mm, own, strict=True))
    return [1.0 if abs(step - 1) <= SAME_SPACING else step for step in steps]


def _weights(n: int, m: int, start: float, step: float) -> csr_array:
    """[m, n] shares of old voxels in new ones, each row's sum 1.

    The linear interpolation between old voxels, and where a step is longer than one of them its mean under a triangle. Both
    keep ramps, so that nothing moves; together they spread as a triangle of two steps' width does: little is left to fold over.
    """
    blur = max(0.0, step**2 - 1) ** 0.5  # voxels, half of the triangle's width: 0 where a step is one voxel or less
    at = start + step * np.arange(m)
    reach = int(np.ceil(blur)) + 1
    columns = np.floor(at).astype(int)[:, None] + np.arange(-reach, reach + 2)  # [m, few]
    away = columns - at[:, None]
    if blur:
        share = (_double_integral(away + blur) - 2 * _double_integral(away) + _double_integral(away - blur)) / blur**2
    else:
        share = np.maximum(0, 1 - np.abs(away))
    kept = (columns >= 0) & (columns < n) & (share > 0)
    share = np.where(kept, share, 0)
    share /= share.sum(1, keepdims=True)
    rows = np.broadcast_to(np.arange(m)[:, None], columns.shape)
    return csr_array((share[kept].astype(np.float32), (rows[kept], columns[kept])), shape=(m, n))


def _double_integral(x: np.ndarray) -> np.ndarray:
    """Of the triangle of linear interpolation, `max(0, 1 - |x|)`."""
    return (np.maximum(0, x + 1) ** 3 - 2 * np.maximum(0, x) ** 3 + np.maximum(0, x - 1) ** 3) / 6
