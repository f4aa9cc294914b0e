"""Raw voxels to what is trained on: finite, mapped to [-1, 1] by percentiles, slice axis last, cropped to the foreground.

The result is kept in 16 bits whether it is cached on disk or not, so that a run is the same with and without a cache.

Source: 3DINO paper, Methods, "3DINO" (percentiles), "3D" RandomResizedCrop (slice axis).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov2.errors import BadInput, BadVolume
from dinov2.geometry import Range, Spacing, triple

if TYPE_CHECKING:
    from torch import Tensor

PERCENTILES = (0.05, 99.95)
INT16_SCALE = 1 / 32767  # of stored voxels, to [-1, 1]
SPACING_TOLERANCE = 1e-2  # mm, within which two axes count as equally spaced
PREPROCESSING = {  # recorded with the weights
    "percentiles": list(PERCENTILES),
    "range": [-1.0, 1.0],
    "non_finite": "mean of the finite voxels",
    "slice_axis": "last",
    "foreground": "bounding box of voxels > -1",
    "storage": "int16, value * 32767",
}


@dataclass(frozen=True)
class Volume:
    """A preprocessed volume.

    Attributes:
        stored: [1, H, W, D] int16, value * 32767, slice axis last, cropped to the foreground.
        spacing_mm: Along H, W, D.
        moved_axis: The stored axis that became the last.
        box: What was kept of the stored volume, after the move.
    """

    stored: np.ndarray
    spacing_mm: Spacing
    moved_axis: int
    box: tuple[slice, slice, slice]

    @cached_property
    def voxels(self) -> Tensor:
        """`stored` as a tensor on the same memory."""
        import torch  # here, so that what only reads and writes volumes starts without it

        return torch.from_numpy(self.stored)

    @property
    def data(self) -> Tensor:
        """[1, H, W, D] float32 in [-1, 1]."""
        return self.voxels.float() * INT16_SCALE

    def align(self, stored: np.ndarray) -> np.ndarray:
        """Another array on the stored volume's grid (labels, a mask) brought to [H, W, D] of `data`."""
        return np.ascontiguousarray(np.moveaxis(stored, self.moved_axis, -1)[self.box])


def slice_axis(spacing_mm: Spacing) -> int:
    """Which axis runs across slices: the one beside the two equally spaced ones.

    All equal: the last. Several pairs within the tolerance: the closest pair is in-plane. None: the coarsest axis.
    """
    others = {0: (1, 2), 1: (0, 2), 2: (0, 1)}
    gaps = {axis: abs(spacing_mm[a] - spacing_mm[b]) for axis, (a, b) in others.items()}
    within = [axis for axis, gap in gaps.items() if gap <= SPACING_TOLERANCE]
    if len(within) == 3:
        return 2
    if within:
        return min(within, key=lambda axis: gaps[axis])
    return int(np.argmax(spacing_mm))


def preprocess(voxels: np.ndarray, spacing_mm: Spacing, name: str) -> Volume:
    """Preprocess one time point.

    Args:
        voxels: [X, Y, Z] float32, as stored; may be changed in place.
        spacing_mm: Along X, Y, Z.
        name: Path for messages.

    Raises:
        BadVolume: No finite voxel, or (nearly) constant.
    """
    voxels = normalise(voxels, name)
    axis = slice_axis(spacing_mm)
    voxels = np.moveaxis(voxels, axis, -1)
    spacing = triple([*(s for i, s in enumerate(spacing_mm) if i != axis), spacing_mm[axis]])
    box = foreground_box(voxels)
    return Volume(to_16_bits(voxels[box])[None], spacing, axis, box)


def normalise(voxels: np.ndarray, name: str, percentiles: Range = PERCENTILES) -> np.ndarray:
    """Intensities to [-1, 1], clipped: the percentiles become -1 and 1.

    Args:
        voxels: Any shape, float32; may be changed in place.
        name: Path for messages.
        percentiles: Lower and upper.

    Raises:
        BadVolume: No finite voxel, or (nearly) constant.
    """
    voxels = fill_non_finite(voxels, name)
    low, high = intensity_range(voxels, name, percentiles)
    voxels -= np.float32(low)
    voxels *= np.float32(2.0 / (high - low))
    voxels -= np.float32(1.0)
    return np.clip(voxels, -1.0, 1.0, out=voxels)


def percentiles_of(preprocessing: Mapping[str, Any]) -> Range:
    """The one thing in which weights' preprocessing may differ from this version's.

    Raises:
        BadInput: Another difference, by name.
    """
    if not isinstance(preprocessing, Mapping):
        raise BadInput(
            f"the weights' preprocessing is {preprocessing!r}, expected keys and values: use the version that wrote them"
        )
    other = [k for k, v in preprocessing.items() if k != "percentiles" and PREPROCESSING.get(k) != v]
    if other:
        raise BadInput(
            f"the weights were trained with {other[0]}={preprocessing[other[0]]!r}, this version does "
            f"{PREPROCESSING.get(other[0])!r}: use the version that wrote them"
        )
    found = preprocessing.get("percentiles", PREPROCESSING["percentiles"])
    numbers = isinstance(found, (list, tuple)) and len(found) == 2 and all(isinstance(p, (int, float)) for p in found)
    if not numbers or not 0 <= found[0] < found[1] <= 100:
        raise BadInput(f"the weights' preprocessing has percentiles {found!r}: expected two rising numbers from 0 to 100")
    return float(found[0]), float(found[1])


def to_16_bits(voxels: np.ndarray) -> np.ndarray:
    """[-1, 1] to int16, value * 32767, contiguous."""
    return np.rint(np.ascontiguousarray(voxels) / np.float32(INT16_SCALE)).astype(np.int16)


def fill_non_finite(voxels: np.ndarray, name: str) -> np.ndarray:
    """Non-finite voxels replaced by the mean of the finite ones; the same array where there are none.

    Raises:
        BadVolume: No finite voxel.
    """
    finite = np.isfinite(voxels)
    if finite.all():
        return voxels
    if not finite.any():
        raise BadVolume(f"{name}: no finite voxel", "non_finite")
    return np.where(finite, voxels, voxels[finite].mean(dtype=np.float64)).astype(np.float32)


def intensity_range(voxels: np.ndarray, name: str, percentiles: Range = PERCENTILES) -> Range:
    """The values that become -1 and 1.

    Raises:
        BadVolume: They are equal.
    """
    low, high = np.percentile(voxels.ravel("K"), percentiles)  # in the order of memory: no transposed copy
    if not high > low:
        same = "constant" if voxels.min() == voxels.max() else "constant but for less than 0.1 % of its voxels"
        raise BadVolume(f"{name}: {same} (value {low:g})", "constant")
    return float(low), float(high)


def foreground_box(voxels: np.ndarray) -> tuple[slice, slice, slice]:
    """Bounding box of the voxels > -1 of [H, W, D]."""
    return bounding_box(voxels > -1)


def bounding_box(inside: np.ndarray) -> tuple[slice, slice, slice]:
    """Of the true cells of [H, W, D], at least one."""
    box = []
    for axis in range(3):
        along = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(along[0]), int(along[-1]) + 1))
    return triple(box)
