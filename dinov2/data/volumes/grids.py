"""Where voxels lie: from a file's own grid to the orientation and spacing of a recipe, and back.

Only axes are swapped, reversed and rescaled; a rotation that the file's affine holds stays in the affine. The grid's first
voxel keeps its place, as in MONAI's `Spacing` (a test holds the two equal).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import nibabel as nib
import numpy as np

from dinov2.geometry import Size3, Spacing, triple

SAME_SPACING = 1e-3  # relative difference up to which a spacing counts as the wanted one, and is kept


@dataclass(frozen=True)
class GridMap:
    """The way between a stored volume [X, Y, Z] and a prepared one [H, W, D].

    Attributes:
        stored_shape: Voxels of the file.
        stored_affine: [4, 4] of the file, voxel -> mm (RAS+).
        orientation: Where the prepared axes point, such as RAS.
        wanted_spacing_mm: Along the prepared axes; None keeps the file's.
    """

    stored_shape: Size3
    stored_affine: np.ndarray
    orientation: str
    wanted_spacing_mm: Spacing | None

    @cached_property
    def _turn(self) -> np.ndarray:
        """[3, 2]: for each stored axis the prepared axis and direction, as nibabel has it."""
        there = nib.orientations.axcodes2ornt(tuple(self.orientation))
        return nib.orientations.ornt_transform(nib.io_orientation(self.stored_affine), there)

    @cached_property
    def _oriented_affine(self) -> np.ndarray:
        return self.stored_affine @ nib.orientations.inv_ornt_aff(self._turn, self.stored_shape)

    @cached_property
    def _oriented_shape(self) -> Size3:
        return triple(self.stored_shape[int(np.argwhere(self._turn[:, 0] == axis)[0, 0])] for axis in range(3))

    @cached_property
    def _steps(self) -> tuple[float, float, float]:
        """Distance of prepared voxels in oriented ones, along each axis; exactly 1 where nothing is resampled."""
        own = np.linalg.norm(self._oriented_affine[:3, :3], axis=0)
        steps = np.ones(3) if self.wanted_spacing_mm is None else np.array(self.wanted_spacing_mm) / own
        return triple(1.0 if abs(s - 1) <= SAME_SPACING else float(s) for s in steps)

    @cached_property
    def shape(self) -> Size3:
        """(H, W, D)."""
        sizes = zip(self._oriented_shape, self._steps, strict=True)
        return triple(n if step == 1 else int(np.round((n - 1) / step + 1)) for n, step in sizes)

    @cached_property
    def affine(self) -> np.ndarray:
        """[4, 4] prepared voxel -> mm (RAS+)."""
        return self._oriented_affine @ np.diag([*self._steps, 1.0])

    @cached_property
    def spacing_mm(self) -> Spacing:
        """Along H, W, D."""
        return triple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    def prepare(self, stored: np.ndarray, linear: bool) -> np.ndarray:
        """A stored array on the prepared grid.

        Args:
            stored: [X, Y, Z].
            linear: Trilinear (images, float32); otherwise the nearest voxel (labels), any type.

        Returns:
            [H, W, D], contiguous.
        """
        array = nib.orientations.apply_orientation(stored, self._turn)
        for axis, (n, step) in enumerate(zip(self.shape, self._steps, strict=True)):
            if step != 1:
                at = np.minimum(np.arange(n) * step, array.shape[axis] - 1)  # beyond the last voxel: that voxel
                array = _interpolate(array, axis, at) if linear else np.take(array, _nearest(at), axis)
        return np.ascontiguousarray(array)

    def restore(self, prepared: np.ndarray) -> np.ndarray:
        """A label map of the prepared grid on the stored one, nearest voxel: [H, W, D] -> [X, Y, Z]."""
        array = prepared
        for axis, (n, step) in enumerate(zip(self._oriented_shape, self._steps, strict=True)):
            if step != 1:
                array = np.take(array, np.minimum(_nearest(np.arange(n) / step), array.shape[axis] - 1), axis)
        there = nib.orientations.axcodes2ornt(tuple(self.orientation))
        back = nib.orientations.ornt_transform(there, nib.io_orientation(self.stored_affine))
        return np.ascontiguousarray(nib.orientations.apply_orientation(array, back))


def _nearest(at: np.ndarray) -> np.ndarray:
    return np.floor(at + 0.5).astype(np.int64)  # a half always upwards, where rounding to even would leave gaps


def _interpolate(array: np.ndarray, axis: int, at: np.ndarray) -> np.ndarray:
    """Linear along one axis, at places (voxels) within the array."""
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, array.shape[axis] - 1)
    share = (at - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    one, other = np.take(array, low, axis), np.take(array, high, axis)
    return one + (other - one) * share


def farthest_corner_mm(shape: Size3, one: np.ndarray, other: np.ndarray) -> float:
    """How far apart two affines put the same voxel of a volume, at most."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)
    difference = (one - other) @ np.vstack([corners, np.ones(8)])
    return float(np.linalg.norm(difference[:3], axis=0).max())
