"""DICOM series: the slices of a folder, put together to volumes by what their headers say; one slice a file.

Headers are read by pydicom, voxels (of any compression) by SimpleITK, so that no slice is decoded before its size is checked.
"""

from __future__ import annotations

import math
import os
import struct
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.volumes.readers import READ_ERRORS, ImageFile, check_size, first_line, lps_affine, simpleitk
from dinov2.errors import BadVolume

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
GAP_TOLERANCE = 0.1  # share of the usual distance by which one between two slices may differ
_SAME_PLACE_MM = 1e-3
_COMPRESSION = 1032  # the most that a slice may be compressed; JPEG's is far less
_NO_SERIES = "a folder without a DICOM series: give a scan's file, or the folder that has its slices"
_SHOWN = 8  # series of a folder that a message names
_DIRECTORY = "1.2.840.10008.1.3.10"  # DICOMDIR, a table of contents
_TAGS = (
    "SeriesInstanceUID", "Modality", "BodyPartExamined", "PatientID", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "BitsAllocated", "PixelRepresentation", "PixelSpacing", "SliceThickness", "ImageOrientationPatient", "ImagePositionPatient",
    "SeriesNumber", "SeriesDescription",
)  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """One file's header.

    Attributes:
        series: Which files belong together.
        shape: Columns, rows.
        spacing: mm between columns, between rows, and the slice's thickness (for a series of one).
        axes: Direction of growing column and row number, 6 numbers, LPS.
        position: mm, LPS, of the first voxel's centre.
        dtype: As stored.
        tags: `modality`, `organ`, `patient`, `series` (number and description) where the header has them.
        fault: Why its voxels cannot be used; its series is then set aside as a whole.
    """

    path: str
    series: str
    shape: tuple[int, int]
    spacing: tuple[float, float, float]
    axes: tuple[float, ...]
    position: tuple[float, ...]
    dtype: str
    tags: dict[str, str]
    fault: BadVolume | None = None

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.axes[:3], self.axes[3:])


def is_dicom(path: str | Path) -> bool:
    """By ending, or by the mark that a DICOM file has after 128 bytes.

    Raises:
        OSError: It cannot be read.
    """
    if str(path).lower().endswith(DICOM_SUFFIXES):
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_slice(path: str) -> Slice | None:
    """A file's header; None for a DICOMDIR.

    Raises:
        BadVolume: Not DICOM, no image, several frames, colour, no place in space; no pydicom.
    """
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError as err:
        raise BadVolume("DICOM needs pydicom: pip install pydicom", "reader_missing") from err
    try:
        with open(path, "rb") as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
            held = os.fstat(file.fileno()).st_size - file.tell()
        if header.file_meta.get("MediaStorageSOPClassUID") == _DIRECTORY:
            return None
        return _slice(path, header, held)
    except InvalidDicomError as err:
        raise BadVolume(f"{path}: is not a DICOM file") from err
    except BadVolume:
        raise
    except PermissionError as err:
        raise BadVolume(f"{path}: {err.strerror}", "permission") from err
    except (*READ_ERRORS, AttributeError, KeyError, TypeError, struct.error) as err:
        raise BadVolume(f"{path}: DICOM header cannot be read: {first_line(err)}") from err


def _slice(path: str, header: Any, held: int) -> Slice:
    kind = str(header.get("Modality", ""))
    if not header.get("Rows") or not header.get("Columns"):
        raise BadVolume(f"{path}: DICOM without an image ({kind or 'no modality'})", "not_an_image")
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise BadVolume(f"{path}: DICOM of several frames in a file: convert it to NIfTI (dcm2niix)", "unsupported")
    if int(header.get("SamplesPerPixel") or 1) != 1:
        raise BadVolume(f"{path}: a colour picture", "not_real_numbers")
    if not all(header.get(t) for t in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient")):
        raise BadVolume(f"{path}: DICOM image without place and spacing ({kind or 'no modality'})", "not_an_image")
    bits = int(header.get("BitsAllocated") or 16)
    is_plain = not header.file_meta.TransferSyntaxUID.is_compressed
    fault = None
    try:
        check_size(path, header.Rows * header.Columns * bits // 8, held, 1 if is_plain else _COMPRESSION)
    except BadVolume as err:
        fault = err
    series = f"{header.get('SeriesNumber') or ''} {header.get('SeriesDescription') or ''}"
    tags = {
        "modality": kind,
        "organ": str(header.get("BodyPartExamined") or ""),
        "patient": str(header.get("PatientID") or ""),
        "series": " ".join(series.split()),
    }
    between_rows, between_columns = (float(s) for s in header.PixelSpacing)
    return Slice(
        path=path,
        series=str(header.SeriesInstanceUID),
        shape=(int(header.Columns), int(header.Rows)),
        spacing=(between_columns, between_rows, float(header.get("SliceThickness") or 1.0)),
        axes=tuple(float(x) for x in header.ImageOrientationPatient),
        position=tuple(float(x) for x in header.ImagePositionPatient),
        dtype=f"{'int' if header.get('PixelRepresentation') else 'uint'}{bits}",
        tags={k: v for k, v in tags.items() if v},
        fault=fault,
    )


def series_of(paths: Iterable[str]) -> tuple[dict[str, list[Slice]], list[tuple[str, BadVolume]]]:
    """Slices by series, and the files that are none."""
    series, bad = defaultdict(list), []
    for path in paths:
        try:
            found = read_slice(path)
        except BadVolume as err:
            bad.append((path, err))
            continue
        if found:
            series[found.series].append(found)
    return dict(series), bad


def stack(slices: list[Slice]) -> ImageFile:
    """The volume of a series: x along the columns, y along the rows, z from the lowest slice up the normal.

    Raises:
        BadVolume: A slice is cut short, they are of several shapes or directions, several at one place, or one is missing.
    """
    first = slices[0]
    for one in slices:
        if one.fault:
            raise BadVolume(f"{first.path}: the series has a bad slice, {one.fault}", one.fault.reason)
    for what in ("shape", "axes", "spacing"):
        if not all(np.allclose(getattr(s, what), getattr(first, what), atol=1e-3) for s in slices):
            raise BadVolume(f"{first.path}: the series has slices of several {what}: separate them", "mixed_slices")
    slices = sorted(slices, key=lambda s: float(np.dot(first.normal, s.position)))
    places = np.array([np.dot(first.normal, s.position) for s in slices])
    gap_mm = _gap(first.path, np.diff(places)) if len(slices) > 1 else first.spacing[2]
    spacing = (*first.spacing[:2], gap_mm)
    direction = np.stack([first.axes[:3], first.axes[3:], first.normal], axis=1)
    affine = lps_affine(direction, spacing, slices[0].position)
    shape = (*first.shape, len(slices))

    def read(_fourth: int) -> np.ndarray:
        sitk = simpleitk()
        voxels = np.empty(shape, np.float32, order="F")
        for k, one in enumerate(slices):
            image = sitk.ReadImage(one.path, sitk.sitkFloat32)  # scaled by its own slope, which a PET's slices differ in
            voxels[:, :, k] = sitk.GetArrayViewFromImage(image).reshape(shape[1], shape[0]).T
        return voxels

    return ImageFile(min(s.path for s in slices), shape, spacing, np.dtype(first.dtype), affine, False, read, first.tags)


def _gap(name: str, gaps_mm: np.ndarray) -> float:
    """The distance of the slices, where it is one."""
    usual = float(np.median(gaps_mm))
    if gaps_mm.min() < _SAME_PLACE_MM:
        at_one_place = int((gaps_mm < _SAME_PLACE_MM).sum())
        what = f"{at_one_place} slices at the place of another (time points, echoes or two scans): separate them"
        raise BadVolume(f"{name}: the series has {what}", "mixed_slices")
    missing = sum(round(g / usual) - 1 for g in gaps_mm if g > (1 + GAP_TOLERANCE) * usual)
    if missing or not all(math.isclose(g, usual, rel_tol=GAP_TOLERANCE) for g in gaps_mm):
        total = len(gaps_mm) + 1 + missing
        what = f"{missing} of {total} slices are missing" if missing else "its slices are not evenly spaced"
        at = f"distances of {gaps_mm.min():.3g} to {gaps_mm.max():.3g} mm, usually {usual:.3g}"
        raise BadVolume(f"{name}: {what} ({at})", "missing_slices")
    return float(gaps_mm.mean())


def open_series(path: str) -> ImageFile:
    """The volume that a DICOM file is a slice of, all files of its folder with the same series; of a folder its only series.

    Raises:
        BadVolume: As of `read_slice` and `stack`; a folder of no series, or of several.
    """
    if os.path.isdir(path):
        return stack(_only_series(path))
    own = read_slice(path)
    if own is None:
        raise BadVolume(f"{path}: a DICOMDIR, no image", "not_an_image")
    series, _ = series_of(dicom_files(Path(path).parent))
    return stack(series[own.series])


def _only_series(folder: str) -> list[Slice]:
    series, bad = series_of(dicom_files(Path(folder)))
    if len(series) == 1:
        return next(iter(series.values()))
    if not series:
        raise bad[0][1] if bad else BadVolume(f"{folder}: {_NO_SERIES}", "not_an_image")
    found = [min(slices, key=lambda s: s.path) for slices in series.values()]
    named = [
        f"{s.tags.get('series', 'without a name')} ({len(series[s.series])} slices, {os.path.basename(s.path)})"
        for s in sorted(found, key=lambda s: s.path)
    ]
    shown = ", ".join(named[:_SHOWN]) + (", ..." if len(named) > _SHOWN else "")
    what = f"holds {len(series)} DICOM series: {shown}: give the named file of one of them in place of the folder"
    raise BadVolume(f"{folder}: {what}", "mixed_slices")


def other_slices(path: Path) -> list[Path]:
    """The other DICOM files of a file's folder; of a folder all of them."""
    if path.is_dir():
        return [Path(p) for p in dicom_files(path)]
    return [Path(p) for p in dicom_files(path.parent) if p != str(path)]


def first_slices(folder: Path) -> list[Path]:
    """A file for each series of a folder; one that cannot be used stands for itself, so that opening it says why."""
    series, bad = series_of(dicom_files(folder))
    return sorted(Path(p) for p in (*(min(s.path for s in slices) for slices in series.values()), *(p for p, _ in bad)))


def dicom_files(folder: Path) -> list[str]:
    """The DICOM files of a folder, by name."""
    paths = sorted(entry.path for entry in os.scandir(folder) if entry.is_file())
    return [p for p in paths if is_dicom(p)]
