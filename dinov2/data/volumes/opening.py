"""Files to arrays: one 3D volume of any supported file, or a `BadVolume` that says what is wrong with it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dinov2.data.datalist import Entry
from dinov2.data.preprocess import slice_axis
from dinov2.data.volumes.bounded import foreign
from dinov2.data.volumes.formats import format_of
from dinov2.data.volumes.grids import farthest_corner_mm
from dinov2.data.volumes.places import check_affine, check_positive, column_spacing, differs, shown_mm
from dinov2.data.volumes.readers import ImageFile
from dinov2.errors import BadVolume
from dinov2.geometry import Spacing, triple
from dinov2.visual.page import square_pixels

logger = logging.getLogger(__name__)

SAME_PLACE = 0.5  # of the smallest voxel edge, by which the corners of files of one grid may lie apart
_FLOAT32 = 1e-6  # relative, a few times the rounding of float32


@dataclass(frozen=True)
class RawVolume:
    """An opened file, voxels not read yet.

    Attributes:
        path: The file; of a DICOM series as the entry names it.
        image: Its header.
        spacing_mm: Of the first three axes.
        num_times: Length of the time axis; 1 without one.
        channel: Which channel is read; None without channels.
        notes: What header or list say of its place otherwise than the affine, which counts.
    """

    path: str
    image: ImageFile
    spacing_mm: Spacing
    num_times: int
    channel: int | None
    notes: tuple[str, ...] = ()

    @property
    def affine(self) -> np.ndarray:
        """[4, 4] stored voxel -> mm (RAS+), a copy; of a format without one, the spacing."""
        own = self.image.affine
        return np.diag([*self.spacing_mm, 1.0]) if own is None else np.array(own, dtype=np.float64)

    def read(self, time: int = 0) -> np.ndarray:
        """The voxels of one time point, [H, W, D] float32, axes as stored.

        Raises:
            BadVolume: The file is damaged.
        """
        with foreign(self.path, "read"):
            return self.image.read(time if self.channel is None else self.channel)

    def padding(self, voxels: np.ndarray) -> np.ndarray | None:
        """Where `read`'s voxels are what the header calls padding; None where it says nothing."""
        return None if self.image.padding is None else self.image.padding(voxels)


def as_whole(values: np.ndarray, step: float) -> np.ndarray:
    """Values within rounding of whole numbers as these, all others as they are.

    Args:
        values: float32.
        step: `ImageFile.step`. Each whole number was stored as the nearest value that there is, so half a step away at most.
    """
    nearest = np.rint(values)
    rounding = _FLOAT32 * np.abs(nearest)
    if 0 < step < 1:  # of a larger one the values that there are say nothing of what was meant
        rounding = step / 2 + _FLOAT32 * np.max(np.abs(values), initial=1)
    with np.errstate(invalid="ignore"):  # infinity is whole enough, and refused where it is met
        return np.where(np.abs(values - nearest) <= rounding, nearest, values)


def open_image(path: str) -> ImageFile:
    """Open a file of any supported format by its name, without a known ending by its first bytes; a folder as a DICOM series.

    Raises:
        BadVolume: Missing, of no such format, damaged, or shorter than its header says.
    """
    with foreign(path, "opened"):
        return format_of(path).open(path)


def open_volume(entry: Entry) -> RawVolume:
    """Open the file of an entry and settle what its axes are.

    Raises:
        BadVolume: Missing, not an image, not 3D or 4D, a fourth axis that nothing explains, no usable spacing.
    """
    raw = raw_volume(entry, open_image(entry.image))
    for note in raw.notes:
        _say_once(raw.path, note)
    return raw


@lru_cache(maxsize=65536)
def _say_once(path: str, note: str) -> None:
    """A file is opened again and again."""
    logger.warning("%s: %s", path, note)


def raw_volume(entry: Entry, image: ImageFile) -> RawVolume:
    """What an entry makes of its opened file.

    Raises:
        BadVolume: As of `open_volume`.
    """
    path = entry.image
    shape, dtype = image.shape, image.dtype
    if not np.issubdtype(dtype, np.number) or np.issubdtype(dtype, np.complexfloating):
        what = f"voxels of type {dtype} are not real numbers (colour and complex images are not supported)"
        raise BadVolume(f"{path}: {what}", "not_real_numbers")
    while len(shape) > 3 and shape[-1] == 1:  # trailing axes of length 1 carry nothing
        shape = shape[:-1]
    if len(shape) not in (3, 4):
        what = f"has {len(shape)} axes {shape}, expected 3, or 4 with time or channels last"
        raise BadVolume(f"{path}: {what}", "axes")
    num_times, channel = 1, None
    if len(shape) == 4:
        num_times, channel = _fourth_axis(entry, image, shape[3])
    spacing, notes = _spacing(entry, image)
    if min(shape) < 1:
        raise BadVolume(f"{path}: is empty, shape {shape}", "axes")
    return RawVolume(path, image, spacing, num_times, channel, notes)


def _spacing(entry: Entry, image: ImageFile) -> tuple[Spacing, tuple[str, ...]]:
    """The affine's, of a format without one the list's; and what says otherwise.

    The file's own notes are its list's where that has the right spacing: making it said them.
    """
    if image.affine is None:
        spacing = entry.spacing_mm or image.spacing[:3]
        if not spacing:
            raise BadVolume(f"{entry.image}: the format has no spacing: add it (mm) to the datalist's entry", "spacing")
        check_positive(entry.image, spacing)
        return triple(spacing), ()
    check_affine(entry.image, image.affine)
    own = column_spacing(image.affine)
    if entry.spacing_mm is None:
        return own, image.notes
    note = f"the list's spacing is {shown_mm(entry.spacing_mm)}, the file's {shown_mm(own)}, which counts"
    return own, (note,) if differs(own, entry.spacing_mm) else ()


def _fourth_axis(entry: Entry, image: ImageFile, length: int) -> tuple[int, int | None]:
    """(time points, channel) of a 4D file."""
    if entry.axes == "xyzc" or (entry.axes is None and image.is_channels):
        channel = entry.channel or 0
        if channel >= length:
            raise BadVolume(f"{entry.image}: channel {channel} of {length}: correct the datalist's channel", "axes")
        return 1, channel
    if entry.axes == "xyzt" or (len(image.spacing) > 3 and image.spacing[3] > 0):
        return length, None
    what = 'add "axes": "xyzt", or "axes": "xyzc" and "channel", to its datalist entry'
    raise BadVolume(f"{entry.image}: fourth axis of {length} is neither time nor channels: {what}", "axes")


def check_same_grid(first: RawVolume, other: RawVolume, pair: str) -> None:
    """Same shape and the same place, voxel by voxel, to less than half of the smallest voxel edge.

    So far each voxel of one file is the nearest one to the same voxel of the other, and putting one on the other's grid would
    change nothing; headers that were rounded on their way lie hundredths of a millimetre apart.

    Args:
        first, other: Opened files.
        pair: Both by name, as a message begins with them.

    Raises:
        BadVolume: Named with what differs.
    """
    shape, other_shape = (triple(raw.image.shape[:3]) for raw in (first, other))
    if shape != other_shape:
        raise BadVolume(f"{pair}: shapes are {other_shape} and {shape}: resample one to the other's grid", "axes")
    apart_mm = farthest_corner_mm(shape, first.affine, other.affine)
    if apart_mm <= SAME_PLACE * min(first.spacing_mm):
        return
    axes, other_axes = ("".join(a or "?" for a in nib.aff2axcodes(raw.affine)) for raw in (first, other))
    if axes != other_axes:
        raise BadVolume(f"{pair}: orientations are {other_axes} and {axes}: save both in one orientation", "axes")
    what = f"voxels lie up to {apart_mm:.3g} mm apart by their headers"
    raise BadVolume(f"{pair}: {what}: resample one to the other's grid", "axes")


def describe(path: str | Path) -> dict[str, Any]:
    """The datalist entry of a file, from its header alone.

    Raises:
        BadVolume: It cannot be opened.
    """
    image = open_image(str(path))
    if image.affine is not None:
        check_affine(str(path), image.affine)
    return {"image": str(path), "shape": list(image.shape), "spacing": [round(z, 6) for z in image.spacing[:3]]}


def mid_slice(entry: Entry, pixels: int) -> np.ndarray:
    """The slice in the middle for people to look at, upright where axes are those of RAS, in its true proportions.

    Args:
        entry: Of a list; its percentiles, where it has them, become black and white.
        pixels: Of the longer side.

    Returns:
        [rows, columns] from 0 to 1.

    Raises:
        BadVolume: It cannot be read.
    """
    raw = open_volume(entry)
    axis = slice_axis(raw.spacing_mm)
    plane = raw.read(0).take(raw.image.shape[axis] // 2, axis=axis)
    low, high = entry.extra.get("percentiles", (float(np.nanmin(plane)), float(np.nanmax(plane))))
    first, second = (s for i, s in enumerate(raw.spacing_mm) if i != axis)
    shown = np.nan_to_num(square_pixels(plane, (first, second), pixels), nan=low).T[::-1]
    return ((shown - low) / max(high - low, 1e-9)).clip(0, 1)
