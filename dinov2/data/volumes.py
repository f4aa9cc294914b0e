"""Files to arrays: one 3D volume of any supported file, or a `BadVolume` that says what is wrong with it."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from dinov2.data.datalist import Entry
from dinov2.errors import BadVolume

# what reading a damaged, truncated or foreign file raises
_READ_ERRORS = (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError, ValueError, MemoryError, OverflowError)


@dataclass(frozen=True)
class RawVolume:
    """An opened file, voxels not read yet.

    Attributes:
        path: The file.
        spacing_mm: Of the first three axes.
        num_times: Length of the time axis; 1 without one.
    """

    path: str
    image: Any
    spacing_mm: tuple[float, float, float]
    num_times: int
    channel: int | None

    def read(self, time: int = 0) -> np.ndarray:
        """The voxels of one time point, [H, W, D] float32, axes as stored.

        Raises:
            BadVolume: The file is damaged.
        """
        fourth = time if self.channel is None else self.channel
        index = (slice(None),) * 3 + (fourth, *[0] * len(self.image.shape))[: len(self.image.shape) - 3]
        try:
            return np.array(self.image.dataobj[index], dtype=np.float32)
        except _READ_ERRORS as err:
            raise BadVolume(f"{self.path}: cannot be read: {_first_line(err)}") from err


def open_volume(entry: Entry) -> RawVolume:
    """Open the file of an entry and settle what its axes are.

    Raises:
        BadVolume: Missing, not an image, not 3D or 4D, a fourth axis that nothing explains, no usable spacing.
    """
    path = entry.image
    try:
        image = nib.load(path)
        zooms = _stored_zooms(image)
        shape = tuple(int(s) for s in image.shape)
        dtype = image.get_data_dtype()
    except _READ_ERRORS as err:
        missing = not Path(path).exists()
        raise BadVolume(f"{path}: {'no such file' if missing else 'cannot be opened: ' + _first_line(err)}") from err
    if not np.issubdtype(dtype, np.number) or np.issubdtype(dtype, np.complexfloating):
        raise BadVolume(f"{path}: voxels of type {dtype} are not real numbers (colour and complex images are not supported)")
    while len(shape) > 3 and shape[-1] == 1:  # trailing axes of length 1 carry nothing
        shape = shape[:-1]
    if len(shape) not in (3, 4):
        raise BadVolume(f"{path}: has {len(shape)} axes {shape}, expected 3, or 4 with time or channels last")
    num_times, channel = 1, None
    if len(shape) == 4:
        num_times, channel = _fourth_axis(entry, shape[3], zooms[3] if len(zooms) > 3 else 0.0)
    spacing = entry.spacing_mm or zooms[:3]
    if not all(math.isfinite(s) and s > 0 for s in spacing):
        raise BadVolume(f"{path}: spacing {tuple(spacing)} is not positive: correct the header or the datalist's spacing")
    if min(shape) == 0:
        raise BadVolume(f"{path}: is empty, shape {shape}")
    return RawVolume(path, image, tuple(spacing), num_times, channel)


def _stored_zooms(image: Any) -> tuple[float, ...]:
    """Spacings as the file has them; nibabel's own reader replaces a zero by 1."""
    if not isinstance(image.header, nib.Nifti1Header):
        return tuple(float(z) for z in image.header.get_zooms())
    holder = image.file_map.get("header", image.file_map["image"])
    with holder.get_prepare_fileobj("rb") as file:
        header = type(image.header).from_fileobj(file, check=False)
    return tuple(float(z) for z in header.get_zooms())


def _fourth_axis(entry: Entry, length: int, spacing: float) -> tuple[int, int | None]:
    """(time points, channel) of a 4D file."""
    if entry.axes == "xyzc":
        channel = entry.channel or 0
        if channel >= length:
            raise BadVolume(f"{entry.image}: channel {channel} of {length}: correct the datalist's channel")
        return 1, channel
    if entry.axes == "xyzt" or spacing > 0:
        return length, None
    raise BadVolume(
        f'{entry.image}: fourth axis of {length} is neither time nor channels: add "axes": "xyzt", or "axes": "xyzc" '
        'and "channel", to its datalist entry'
    )


def _first_line(err: BaseException) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0] or type(err).__name__


def describe(path: str | Path) -> dict[str, Any]:
    """The datalist entry of a file, from its header alone.

    Raises:
        BadVolume: It cannot be opened.
    """
    try:
        image = nib.load(path)
        zooms = _stored_zooms(image)
        shape = [int(s) for s in image.shape]
    except _READ_ERRORS as err:
        raise BadVolume(f"{path}: cannot be opened: {_first_line(err)}") from err
    return {"image": str(path), "shape": shape, "spacing": [round(float(z), 6) for z in zooms[:3]]}
