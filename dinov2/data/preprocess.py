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
FEWEST_PADDED = 0.0005  # share of voxels that the lower percentile leaves out; a plateau of fewer changes nothing
MOST_PADDED = 0.999  # what is left of a volume is then constant for all purposes
FEWEST_VALUES = 64  # of a sample of what is left; fewer are labels, and 0 is one of them
_SAMPLED = 4096
PREPROCESSING = {  # recorded with the weights
    "percentiles": list(PERCENTILES),
    "range": [-1.0, 1.0],
    "non_finite": "mean of the finite voxels",
    "padding": "no part in percentiles, -1",
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


def preprocess(
    voxels: np.ndarray, spacing_mm: Spacing, name: str, padding: np.ndarray | None = None, across: int | None = None
) -> Volume:
    """Preprocess one time point.

    Args:
        voxels: [X, Y, Z] float32, as stored; may be changed in place.
        spacing_mm: Along X, Y, Z.
        name: Path for messages.
        padding: Where the header says that nothing was measured.
        across: The axis that becomes the last; None: the one across slices, by the spacing.

    Raises:
        BadVolume: No finite voxel, or (nearly) constant.
    """
    voxels = normalise(voxels, name, padding=padding)
    axis = slice_axis(spacing_mm) if across is None else across
    voxels = np.moveaxis(voxels, axis, -1)
    spacing = triple([*(s for i, s in enumerate(spacing_mm) if i != axis), spacing_mm[axis]])
    box = foreground_box(voxels)
    return Volume(to_16_bits(voxels[box])[None], spacing, axis, box)


def normalise(voxels: np.ndarray, name: str, percentiles: Range = PERCENTILES, padding: np.ndarray | None = None) -> np.ndarray:
    """Intensities to [-1, 1], clipped: the percentiles of what is no padding become -1 and 1, padding -1.

    Args:
        voxels: Any shape, float32; may be changed in place.
        name: Path for messages.
        percentiles: Lower and upper.
        padding: Where the header says that nothing was measured.

    Raises:
        BadVolume: No finite voxel, or (nearly) constant.
    """
    voxels, padding = settle(voxels, name, padding)
    low, high = intensity_range(voxels, name, percentiles, padding)
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


def windowed(voxels: np.ndarray, name: str, window: Range, padding: np.ndarray | None = None) -> np.ndarray:
    """Intensities of a window to [-1, 1], clipped; arguments as of `normalise`.

    Raises:
        BadVolume: No finite voxel, or none above the window's lower end.
    """
    voxels, _ = settle(voxels, name, padding)
    low, high = window
    found = np.clip((voxels - np.float32(low)) * np.float32(2 / (high - low)) - np.float32(1), -1, 1)
    if not (found > -1).any():
        raise BadVolume(
            f"{name}: no voxel above {low:g}, the lower end of this network's window {low:g} to {high:g}", "constant"
        )
    return found


def settle(voxels: np.ndarray, name: str, padding: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Voxels that all are values: non-finite ones become the mean of the others, padding the lowest of them.

    Padding is what the header says, and a plateau far below everything else (`far_plateau`).

    Args:
        voxels: Any shape, float32; the same array comes back where nothing is to be done.
        name: Path for messages.
        padding: Where the header says that nothing was measured.

    Returns:
        The voxels, and where padding is; None where there is none.

    Raises:
        BadVolume: No finite voxel.
    """
    finite = np.isfinite(voxels)
    all_finite = bool(finite.all())
    if not all_finite and not finite.any():
        raise BadVolume(f"{name}: no finite voxel", "non_finite")
    measured = finite if padding is None or padding[finite].all() else finite & ~padding  # all: nothing else is there
    is_whole = all_finite if measured is finite else bool(measured.all())
    lowest = far_plateau(voxels.ravel("K") if is_whole else voxels[measured])
    if is_whole and lowest is None:
        return voxels, None
    if lowest is not None:
        measured = measured & (voxels != lowest)
    values = voxels[measured]
    voxels = voxels if all_finite else np.where(finite, voxels, values.mean(dtype=np.float64)).astype(np.float32)
    padded = finite & ~measured
    return (np.where(padded, values.min(), voxels), padded) if padded.any() else (voxels, None)


def far_plateau(values: np.ndarray) -> float | None:
    """The lowest value, where it fills up what was not measured: as scanners write -32768 outside a round field of view.

    It is taken for that where many voxels have it and it lies further below all others than these are apart, so that it
    would take more than half of the range from them. Zero is the background of masked images, and images of few values
    (labels) have no padding.

    Args:
        values: [N], finite.

    Returns:
        The value; None where there is no such plateau.
    """
    lowest = float(values.min())
    if lowest >= 0:
        return None
    num_padded = np.count_nonzero(values == lowest)
    if not FEWEST_PADDED * values.size <= num_padded <= MOST_PADDED * values.size:
        return None
    sample = values[:: max(1, values.size // _SAMPLED) | 1]  # an odd step, not to run along one plane
    sample = sample[sample > lowest].astype(np.float64)
    if len(np.unique(sample)) < FEWEST_VALUES or sample.min() - lowest <= np.ptp(np.percentile(sample, (5, 95))):
        return None  # so for nearly every volume, without a copy of it
    others = values[values > lowest]
    nearest, highest = float(others.min()), float(np.percentile(others, PERCENTILES[1]))
    return lowest if nearest - lowest > highest - nearest else None


def intensity_range(
    voxels: np.ndarray, name: str, percentiles: Range = PERCENTILES, padding: np.ndarray | None = None
) -> Range:
    """The values that become -1 and 1.

    Raises:
        BadVolume: They are equal.
    """
    values = voxels.ravel("K") if padding is None else voxels[~padding]  # in the order of memory: no transposed copy
    low, high = np.percentile(values, percentiles)
    if not high > low:
        same = "constant" if values.min() == values.max() else "constant but for less than 0.1 % of its voxels"
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
