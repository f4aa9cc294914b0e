"""DICOM series: the slices of a folder, put together to volumes by what their headers say; one slice a file.

Headers and voxels are read by pydicom, compressed ones decoded by SimpleITK, none before its size is checked. A volume
is what was stored x slope + intercept, whatever the header says of how to show it.
"""

from __future__ import annotations

import filecmp
import io
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.volumes.bounded import check_expansion, foreign, open_regular
from dinov2.data.volumes.places import SAME, check_positive, column_spacing
from dinov2.data.volumes.readers import READER_MISSING, ImageFile, check_size, lps_affine, simpleitk
from dinov2.errors import BadVolume
from dinov2.optional import needed_for

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
GAP_TOLERANCE = 0.1  # share of the usual distance, or of a pixel, by which a slice may lie off its place on a straight line
_SAME_PLACE_MM = 1e-3
_MARK = b"DICM"  # after 128 bytes that may be anything
_MAX_INFLATED = 2**28  # bytes of a deflated slice; 8,192 x 8,192 pixels of 4
_LAST_FIRST_TAG = 0x18  # of group 8: a file without preamble begins with its length, character set, image type, date or names
_MAX_FIRST_VALUE = 256  # bytes of that
_FIRST = b"\x02\x00\x00\x00UL\x04\x00"  # of group 2: its length
_SYNTAX = b"\x02\x00\x10\x00UI"
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_COMPRESSION = 1032  # the most that a slice may be compressed; JPEG's is far less
_NO_SERIES = "a folder without a DICOM series: give a scan's file, or the folder that has its slices"
_SHOWN = 8  # series or files of a folder that a message names
_COMPARED = 16  # slices, one of which is taken to be like most
_DIRECTORY = "1.2.840.10008.1.3.10"  # DICOMDIR, a table of contents
_TAGS = (
    "SeriesInstanceUID", "Modality", "BodyPartExamined", "PatientID", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "BitsAllocated", "PixelRepresentation", "PixelSpacing", "SliceThickness", "ImageOrientationPatient", "ImagePositionPatient",
    "SeriesNumber", "SeriesDescription", "SOPInstanceUID", "PhotometricInterpretation", "BitsStored", "HighBit", "RescaleSlope",
    "RescaleIntercept", "PixelPaddingValue", "PixelPaddingRangeLimit", "ModalityLUTSequence",
)  # fmt: skip
_DECODING = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
_BITS = (8, 16, 32)


@dataclass(frozen=True)
class Pixels:
    """How a slice's voxels are stored.

    Attributes:
        is_native: Not compressed.
        is_signed: Whole numbers with a sign.
        bits: Allocated a voxel.
        bits_stored: Of them used.
        high_bit: The highest of those.
        slope, intercept: What stored values become.
    """

    is_native: bool
    is_signed: bool
    bits: int
    bits_stored: int
    high_bit: int
    slope: float
    intercept: float


@dataclass(frozen=True)
class Slice:
    """One file's header.

    Attributes:
        series: Which files belong together.
        shape: Columns, rows.
        spacing: mm between columns, between rows.
        thickness: mm, for a series of one; 0 where the header has none.
        axes: Direction of growing column and row number, 6 numbers, LPS, of length 1.
        position: mm, LPS, of the first voxel's centre.
        dtype: As stored.
        instance: The picture's own name, which a copy of the file shares.
        tags: `modality`, `organ`, `patient`, `series` (number and description) where the header has them.
        fault: Why its voxels cannot be used; its series is then set aside as a whole.
        pixels: How they are stored.
        padding: Lowest and highest value, scaled, that fills up where nothing was measured; None without.
    """

    path: str
    series: str
    shape: tuple[int, int]
    spacing: tuple[float, float]
    thickness: float
    axes: tuple[float, ...]
    position: tuple[float, ...]
    dtype: str
    instance: str
    tags: dict[str, str]
    pixels: Pixels
    fault: BadVolume | None = None
    padding: tuple[float, float] | None = None

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.axes[:3], self.axes[3:])


def is_dicom(path: str | Path) -> bool:
    """By ending, by the mark that a DICOM file has after 128 bytes, or without these by the tag that it begins with.

    Raises:
        OSError: It cannot be read.
    """
    if str(path).lower().endswith(DICOM_SUFFIXES):
        return True
    with open_regular(path) as file:
        start = file.read(132)
    return start[128:] == _MARK or _is_bare(start)


def _is_bare(start: bytes) -> bool:
    """Whether a file's first bytes are a tag: that of group 2's length, or one of the first of group 8 with a short value."""
    if start[128:132] == _MARK or len(start) < 8:
        return False
    if start[:2] != b"\x08\x00" or start[2] > _LAST_FIRST_TAG or start[3] != 0:
        return start[:8] == _FIRST
    is_typed = start[4:6].isalpha() and start[4:6].isupper()
    length = int.from_bytes(start[6:8] if is_typed else start[4:8], "little")
    return length <= _MAX_FIRST_VALUE and length % 2 == 0


def read_slice(path: str) -> Slice | None:
    """A file's header; None for a DICOMDIR.

    Raises:
        BadVolume: Not DICOM, no image, several frames, colour, no place in space; no pydicom.
    """
    with needed_for(f"{path}: DICOM", READER_MISSING):
        import pydicom
        from pydicom.errors import BytesLengthException, InvalidDicomError
    with foreign(path, "read as DICOM", (BytesLengthException,)), open_regular(path) as file:
        is_bare = _is_bare(file.read(132))
        is_deflated = _check_deflated(path)
        file.seek(0)
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS), force=is_bare)
        except InvalidDicomError as err:
            raise BadVolume(f"{path}: is not a DICOM file") from err
        held = os.fstat(file.fileno()).st_size - (0 if is_deflated else file.tell())
        if header.file_meta.get("MediaStorageSOPClassUID") == _DIRECTORY:
            return None
        return _slice(path, header, held)


def _check_deflated(path: str) -> bool:
    """Whether all behind the file's own facts is deflated; if so, held to what a slice may have before pydicom expands it.

    Raises:
        BadVolume: It expands further, or is damaged.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        head = file.read(4096)
    first = 132 if head[128:132] == _MARK else 0
    at = head.find(_SYNTAX, first)
    uid = head[at + 8 : at + 8 + int.from_bytes(head[at + 6 : at + 8], "little")].strip(b"\0 ")
    if at < 0 or uid != _DEFLATED:
        return False
    if head[first : first + 8] != _FIRST:
        raise BadVolume(f"{path}: deflated, and its header does not say from where: convert it (dcmconv)", "unsupported")
    start = first + 12 + int.from_bytes(head[first + 8 : first + 12], "little")
    check_expansion(path, _MAX_INFLATED, start, is_raw=True)
    return True


def _slice(path: str, header: Any, held: int) -> Slice:
    kind = str(header.get("Modality", ""))
    if not header.get("Rows") or not header.get("Columns"):
        raise BadVolume(f"{path}: DICOM without an image ({kind or 'no modality'})", "not_an_image")
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise BadVolume(f"{path}: DICOM of several frames in a file: convert it to NIfTI (dcm2niix)", "unsupported")
    if int(header.get("SamplesPerPixel") or 1) != 1:
        raise BadVolume(f"{path}: a colour picture", "not_real_numbers")
    if "PALETTE" in str(header.get("PhotometricInterpretation", "")):
        raise BadVolume(f"{path}: a colour picture (by a palette)", "not_real_numbers")
    if not all(header.get(t) for t in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient")):
        raise BadVolume(f"{path}: DICOM image without place and spacing ({kind or 'no modality'})", "not_an_image")
    syntax = header.file_meta.get("TransferSyntaxUID")  # of a file without preamble none
    pixels = _pixels(path, header, is_native=syntax is None or not syntax.is_compressed)
    is_plain = pixels.is_native and not (syntax and syntax.is_deflated)
    fault, axes = None, tuple(float(x) for x in header.ImageOrientationPatient)
    position, pixel = tuple(float(x) for x in header.ImagePositionPatient), tuple(float(s) for s in header.PixelSpacing)
    try:
        check_size(path, header.Rows * header.Columns * pixels.bits // 8, held, 1 if is_plain else _COMPRESSION)
        axes = _directions(path, axes, position, pixel)
    except BadVolume as err:
        fault = err
    series = f"{header.get('SeriesNumber') or ''} {header.get('SeriesDescription') or ''}"
    tags = {
        "modality": kind,
        "organ": str(header.get("BodyPartExamined") or ""),
        "patient": str(header.get("PatientID") or ""),
        "series": " ".join(series.split()),
    }
    return Slice(
        path=path,
        series=str(header.SeriesInstanceUID),
        shape=(int(header.Columns), int(header.Rows)),
        spacing=(pixel[-1], pixel[0]),  # between columns, between rows
        thickness=float(header.get("SliceThickness") or 0.0),
        axes=axes,
        position=position,
        dtype=f"{'int' if pixels.is_signed else 'uint'}{pixels.bits}",
        instance=str(header.get("SOPInstanceUID") or ""),
        tags={k: v for k, v in tags.items() if v},
        pixels=pixels,
        fault=fault,
        padding=_padding(header, pixels),
    )


def _directions(path: str, axes: Sequence[float], position: Sequence[float], pixel: Sequence[float]) -> tuple[float, ...]:
    """The two directions of an image's plane, of length 1.

    Raises:
        BadVolume: Numbers are missing or not finite, or these are no two directions at a right angle.
    """
    counts, wanted = (len(axes), len(position), len(pixel)), (6, 3, 2)
    if counts != wanted or not np.isfinite([*axes, *position, *pixel]).all():
        what = f"orientation {tuple(axes)}, position {tuple(position)}, pixel spacing {tuple(pixel)}"
        raise BadVolume(f"{path}: {what}: expected {', '.join(map(str, wanted))} finite numbers", "geometry")
    check_positive(path, pixel)
    pair = np.reshape(axes, (2, 3))
    lengths = np.linalg.norm(pair, axis=1)
    if abs(lengths - 1).max() > SAME or abs(pair[0] @ pair[1]) > SAME:
        raise BadVolume(f"{path}: orientation {tuple(axes)} is no two directions at a right angle", "geometry")
    return tuple(float(x) for x in (pair / lengths[:, None]).ravel())


def _pixels(path: str, header: Any, is_native: bool) -> Pixels:
    """How the voxels are stored.

    Raises:
        BadVolume: In a way that cannot be read.
    """
    bits = int(header.get("BitsAllocated") or 16)
    stored = int(header.get("BitsStored") or bits)
    high, slope, intercept = header.get("HighBit"), header.get("RescaleSlope"), header.get("RescaleIntercept")
    found = Pixels(
        is_native=is_native,
        is_signed=bool(header.get("PixelRepresentation")),
        bits=bits,
        bits_stored=stored,
        high_bit=stored - 1 if high is None else int(high),
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
    )
    if bits not in _BITS or not 0 < stored <= found.high_bit + 1 <= bits:
        what = f"{stored} bits up to bit {found.high_bit} of {bits} a voxel"
        raise BadVolume(f"{path}: DICOM of {what}: convert it to 8, 16 or 32 bits", "unsupported")
    if not (math.isfinite(found.slope) and math.isfinite(found.intercept)) or found.slope == 0:
        raise BadVolume(f"{path}: RescaleSlope {slope} and RescaleIntercept {intercept} give no values", "unsupported")
    if header.get("ModalityLUTSequence"):
        raise BadVolume(
            f"{path}: values by a table (ModalityLUTSequence), not by slope and intercept: convert it", "unsupported"
        )
    if not is_native and found.high_bit != stored - 1:
        raise BadVolume(f"{path}: compressed {stored} of {bits} bits, shifted: decompress it (gdcmconv --raw)", "unsupported")
    return found


def _padding(header: Any, pixels: Pixels) -> tuple[float, float] | None:
    """Values of the padding, from stored ones; the tags may be written as numbers of the other sign."""
    limits = [header.get(t) for t in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    numbers = [int.from_bytes(v, "little") if isinstance(v, bytes) else v for v in limits]  # bytes: without a type of its own
    stored = [_with_sign(int(v), pixels) for v in numbers if isinstance(v, (int, float))]
    scaled = sorted(v * pixels.slope + pixels.intercept for v in stored)
    return (scaled[0], scaled[-1]) if scaled and limits[0] is not None else None


def _with_sign(value: int, pixels: Pixels) -> int:
    top = 1 << pixels.bits
    value %= top
    return value - top if pixels.is_signed and value >= top // 2 else value


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
    """The volume of a series: x along the columns, y along the rows, z from the lowest slice to the highest by the normal.

    The slices' positions give z its direction too: of a tilted gantry it is not the normal.

    Raises:
        BadVolume: A slice is cut short or has no place, they are of several shapes or directions, several at one place, one is
            missing, or they do not lie on a straight line.
    """
    first = slices[0]
    for one in slices:
        if one.fault:
            raise BadVolume(f"{first.path}: the series has a bad slice, {one.fault}", one.fault.reason)
    slices = _without_copies(slices)
    _check_alike(slices)
    slices = sorted(slices, key=lambda s: float(np.dot(first.normal, s.position)))
    step = _step(slices)
    affine = lps_affine(np.stack([first.axes[:3], first.axes[3:], step], axis=1), (*first.spacing, 1.0), slices[0].position)
    shape = (*first.shape, len(slices))

    def read(_fourth: int) -> np.ndarray:
        voxels = np.empty(shape, np.float32, order="F")
        for k, one in enumerate(slices):
            voxels[:, :, k] = _values(one)
        return voxels

    def padding(voxels: np.ndarray) -> np.ndarray:
        """Where a slice has the values that its header calls padding, to within half a stored step."""
        found = np.zeros(voxels.shape, bool, order="F")
        for k, one in enumerate(slices):
            if one.padding:
                step = abs(one.pixels.slope) / 2
                found[:, :, k] = (voxels[:, :, k] >= one.padding[0] - step) & (voxels[:, :, k] <= one.padding[1] + step)
        return found

    name, has_padding = min(s.path for s in slices), any(s.padding for s in slices)
    return ImageFile(
        name, shape, column_spacing(affine), np.dtype(first.dtype), affine, False, read, first.tags,
        padding=padding if has_padding else None,
    )  # fmt: skip


def _values(one: Slice) -> np.ndarray:
    """[columns, rows] float32: stored x slope + intercept, each slice's own, in which those of a PET differ."""
    import pydicom
    from pydicom.errors import BytesLengthException

    pixels = one.pixels
    with foreign(one.path, "read", (BytesLengthException,)), open_regular(one.path) as file:
        header = pydicom.dcmread(file, specific_tags=[*_DECODING, "PixelData"], force=True)  # force: without preamble too
        words = _native(one, header) if pixels.is_native else _decoded(header)  # [rows, columns]
    if pixels.bits_stored != pixels.bits:  # what is above or below these is something else
        words = (words << (pixels.bits - 1 - pixels.high_bit)) >> (pixels.bits - pixels.bits_stored)  # which keeps a sign
    return (words.T * pixels.slope + pixels.intercept).astype(np.float32)


def _native(one: Slice, header: Any) -> np.ndarray:
    """[rows, columns] whole numbers of a slice that is not compressed, as they stand in the file."""
    (columns, rows), bits = one.shape, one.pixels.bits
    content, is_little = header.PixelData, header.original_encoding[1] is not False
    if bits == 8 and not is_little and header["PixelData"].VR == "OW":  # two voxels in a word
        content = np.frombuffer(content, ">u2").astype("<u2").tobytes()
    kind = f"{'<' if is_little else '>'}{'i' if one.pixels.is_signed else 'u'}{bits // 8}"
    return np.frombuffer(content, kind, count=rows * columns).reshape(rows, columns)


def _decoded(header: Any) -> np.ndarray:
    """[rows, columns] whole numbers of a compressed slice: run lengths by pydicom, JPEG's kinds by SimpleITK.

    SimpleITK is given a file of its own with what decoding takes and no more. So it neither scales nor turns values, and what
    else stands in a foreign file, such as lengths that it would take memory for, does not reach it.
    """
    import pydicom
    from pydicom.encaps import encapsulate, generate_frames
    from pydicom.pixels.decoders import RLELosslessDecoder

    header.PhotometricInterpretation = "MONOCHROME2"  # the lowest value black: as it is stored
    if header.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless:
        return RLELosslessDecoder.as_array(header, index=0, raw=True)[0]
    header.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    header.SOPInstanceUID = pydicom.uid.UID("1.2.3")
    header.PixelData = encapsulate(list(generate_frames(header.PixelData, number_of_frames=1)))
    header["PixelData"].VR = "OB"
    syntax, header.file_meta = header.file_meta.TransferSyntaxUID, pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = syntax
    content = io.BytesIO()
    header.save_as(content, enforce_file_format=True)
    sitk = simpleitk()
    with _named(content.getbuffer()) as name:
        return sitk.GetArrayFromImage(sitk.ReadImage(name, imageIO="GDCMImageIO"))[0]


@contextmanager
def _named(content: memoryview) -> Iterator[str]:
    """A file with this content, under a name, while the context lasts: in memory, where the system has such files."""
    if hasattr(os, "memfd_create"):  # which a kill does not leave behind
        descriptor = os.memfd_create("slice")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{descriptor}"
    else:
        with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
            file.write(content)
            file.flush()
            yield file.name


def _without_copies(slices: list[Slice]) -> list[Slice]:
    """Each picture once; files that share its name and place, and not its voxels, stay and are refused as two at one place."""
    kept: dict[tuple[str, tuple[float, ...]], list[Slice]] = defaultdict(list)
    for one in sorted(slices, key=lambda s: (len(s.path), s.path)):
        same = kept[one.instance, one.position]
        if not (one.instance and any(_are_copies(one, other) for other in same)):
            same.append(one)
    return [one for same in kept.values() for one in same]


def _are_copies(one: Slice, other: Slice) -> bool:
    """The same in all that is read of them; headers may differ in the rest."""
    if replace(one, path=other.path, tags=other.tags) != other:
        return False
    if filecmp.cmp(one.path, other.path, shallow=False):
        return True
    try:
        return np.array_equal(_values(one), _values(other))
    except BadVolume:
        return False


def _check_alike(slices: list[Slice]) -> None:
    """All of one shape, direction and pixel spacing.

    Raises:
        BadVolume: The files that differ from most, by name.
    """
    for what, words in (("shape", "shapes"), ("axes", "directions"), ("spacing", "pixel spacings")):
        values = np.array([getattr(s, what) for s in slices])
        alike = np.array([np.isclose(values, value, rtol=1e-5, atol=1e-3).all(axis=1) for value in values[:_COMPARED]])
        others = [
            os.path.basename(s.path) for s, same in zip(slices, alike[alike.sum(axis=1).argmax()], strict=True) if not same
        ]
        if others:
            shown = ", ".join(sorted(others)[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
            found = f"slices of several {words}: {len(others)} of {len(slices)} differ from the rest ({shown})"
            raise BadVolume(f"{slices[0].path}: the series has {found}: move them elsewhere", "mixed_slices")


def _step(slices: list[Slice]) -> np.ndarray:
    """mm (LPS) from one slice's first voxel to the next one's, of sorted slices on a straight line.

    Raises:
        BadVolume: They do not lie on one at even distances; of one slice alone the thickness is not known.
    """
    first = slices[0]
    if len(slices) == 1:
        if not (math.isfinite(first.thickness) and first.thickness > 0):
            raise BadVolume(f"{first.path}: a single slice without a thickness: its extent is not known", "spacing")
        return first.normal * first.thickness
    positions = np.array([s.position for s in slices])  # [n, 3]
    _check_gaps(first.path, np.diff(positions @ first.normal))
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    off = positions - positions[0] - np.arange(len(slices))[:, None] * step
    along = np.abs(off @ first.normal)
    aside = np.linalg.norm(off - np.outer(off @ first.normal, first.normal), axis=1)
    if along.max() > GAP_TOLERANCE * float(step @ first.normal):
        what = f"its slices are not evenly spaced (up to {along.max():.3g} mm off, {step @ first.normal:.3g} apart)"
        raise BadVolume(f"{first.path}: {what}", "missing_slices")
    if aside.max() > GAP_TOLERANCE * min(first.spacing):
        what = f"its slices do not lie on a straight line (up to {aside.max():.3g} mm aside)"
        raise BadVolume(f"{first.path}: {what}: separate or correct them", "mixed_slices")
    return step


def _check_gaps(name: str, gaps_mm: np.ndarray) -> None:
    """That the distances of the slices are about one.

    Raises:
        BadVolume: Several at one place, one missing, or uneven.
    """
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


def open_series(path: str) -> ImageFile:
    """The volume that a DICOM file is a slice of, all files of its folder with the same series; of a folder its only series.

    Raises:
        BadVolume: As of `read_slice` and `stack`; a folder of no series, or of several.
    """
    if os.path.isdir(path):
        return _stacked(*_only_series(path))
    own = read_slice(path)
    if own is None:
        raise BadVolume(f"{path}: a DICOMDIR, no image", "not_an_image")
    series, bad = series_of(_files_of_series(Path(path).parent))
    return _stacked(series[own.series], bad)


def _stacked(slices: list[Slice], bad: list[tuple[str, BadVolume]]) -> ImageFile:
    """The volume, with a note of the files that are in no series; one of them may have been its slice."""
    image = stack(slices)
    if not bad:
        return image
    what = f"{len(bad)} DICOM files beside it are left out, {os.path.basename(bad[0][0])}: {bad[0][1]}"
    return replace(image, notes=(*image.notes, what))


def _only_series(folder: str) -> tuple[list[Slice], list[tuple[str, BadVolume]]]:
    series, bad = series_of(_files_of_series(Path(folder)))
    if len(series) == 1:
        return next(iter(series.values())), bad
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
    series, bad = series_of(_files_of_series(folder))
    return sorted(Path(p) for p in (*(min(s.path for s in slices) for slices in series.values()), *(p for p, _ in bad)))


def dicom_files(folder: Path) -> list[str]:
    """The DICOM files of a folder, by name."""
    return [p for p in sorted(entry.path for entry in os.scandir(folder) if entry.is_file()) if is_dicom(p)]


def _files_of_series(folder: Path) -> list[str]:
    """What is to be read as slices: the DICOM files, and what only bears the name of one, so that it is named."""
    named = [
        e.path for e in os.scandir(folder) if e.name.lower().endswith(DICOM_SUFFIXES) and not e.is_file() and not e.is_dir()
    ]
    return sorted([*dicom_files(folder), *named])
