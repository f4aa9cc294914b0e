"""A scan's three planes through a place of the world: upright, in square pixels, whatever its axes and spacing are."""

from __future__ import annotations

import itertools

import numpy as np
from scipy import ndimage

PIXELS = 280  # of the longest side
GAP = 6  # pixels between planes
_MARK = (1.0, 0.72, 0.1)
_MARK_GAP, _MARK_END = 6, 22  # pixels from the place, where the lines of the cross begin and end
_AXES = ((1, 2), (0, 2), (0, 1))  # of the sagittal, coronal and axial plane: which world axes go right and up


def three_planes(volume: np.ndarray, affine: np.ndarray, place_mm: np.ndarray, is_marked: bool = False) -> np.ndarray:
    """Sagittal, coronal and axial plane through a place, side by side at one scale; up is up (front, in the axial one).

    The patient's left is on the left, and the front on the right of the sagittal plane.

    Args:
        volume: [H, W, D] from 0 (black) to 1.
        affine: [4, 4] voxel -> mm, RAS+.
        place_mm: [3].
        is_marked: Draw a cross there.

    Returns:
        [rows, columns, 3] from 0 to 1.
    """
    planes = [plane(volume, affine, across, place_mm, is_marked) for across in range(3)]
    height = max(len(image) for image in planes)
    return np.concatenate([_padded(image, height) for image in planes], axis=1)[:, GAP:]


def plane(volume: np.ndarray, affine: np.ndarray, across: int, place_mm: np.ndarray, is_marked: bool = False) -> np.ndarray:
    """One of them: across x (0, sagittal), y (1, coronal) or z (2, axial); [rows, columns, 3] from 0 to 1."""
    corners = np.array(list(itertools.product(*[(-0.5, n - 0.5) for n in volume.shape])))  # [8, 3]
    corners_mm = corners @ affine[:3, :3].T + affine[:3, 3]
    low, high = corners_mm.min(0), corners_mm.max(0)
    step_mm = float((high - low).max()) / PIXELS
    numbers = np.maximum(1, np.round((high - low) / step_mm).astype(int))
    lines = [low[a] + (np.arange(n) + 0.5) * (high[a] - low[a]) / n for a, n in enumerate(numbers)]
    image = np.repeat(
        _sampled(volume, affine, lines, across, float(place_mm[across]))[::-1, :, None], 3, axis=2
    )  # from the top
    if is_marked:
        column, row = (int(np.abs(lines[axis] - place_mm[axis]).argmin()) for axis in _AXES[across])
        _mark(image, len(image) - 1 - row, column)
    return image


def _sampled(volume: np.ndarray, affine: np.ndarray, lines: list[np.ndarray], across: int, at_mm: float) -> np.ndarray:
    """[up, right] of the plane at a place along one axis of the world; black outside the volume."""
    right, up = _AXES[across]
    points = np.empty((len(lines[up]), len(lines[right]), 3))
    points[..., across] = at_mm
    points[..., right], points[..., up] = lines[right], lines[up][:, None]
    inverse = np.linalg.inv(affine)
    where = np.moveaxis(points @ inverse[:3, :3].T + inverse[:3, 3], -1, 0)  # [3, up, right] in voxels
    inside = np.all([(w >= -0.5) & (w <= n - 0.5) for w, n in zip(where, volume.shape, strict=True)], axis=0)
    values = ndimage.map_coordinates(volume, where, order=1, mode="nearest", output=np.float32)
    return np.where(inside, values, 0)


def _mark(image: np.ndarray, row: int, column: int) -> None:
    """Four lines that point at a place and leave it free."""
    for near, far in ((-_MARK_END, -_MARK_GAP), (_MARK_GAP, _MARK_END)):
        image[max(0, row + near) : max(0, row + far), column : column + 2] = _MARK
        image[row : row + 2, max(0, column + near) : max(0, column + far)] = _MARK


def _padded(image: np.ndarray, height: int) -> np.ndarray:
    """Black rows above and beneath, and a gap on the left."""
    above = (height - len(image)) // 2
    return np.pad(image, ((above, height - len(image) - above), (GAP, 0), (0, 0)))
