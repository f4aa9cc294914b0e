"""Image files of several formats behind one face: a header that was held against the file's size, voxels on demand.

NIfTI and its relatives by nibabel, NRRD and MetaImage by SimpleITK, NumPy arrays; DICOM series are in `dicom.py`. Which ending
is which format's is in `formats.py`.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError

from dinov2.data.volumes.bounded import (
    MAX_TEXT_BYTES,
    MAX_TRAILING_BYTES,
    check_expansion,
    check_regular,
    expanded,
    is_packed,
    open_regular,
)
from dinov2.data.volumes.nifti import PAIR, check_start, compression, load_nifti, nifti_place, open_content
from dinov2.data.volumes.places import check_positive, column_spacing, differs, header_text, of_text_header, shown_mm
from dinov2.errors import BadVolume
from dinov2.optional import needed_for

READER_MISSING = partial(BadVolume, reason="reader_missing")

_PLAIN_SUFFIXES = (".nii", ".img", ".hdr", ".mgh", ".gz", ".bz2", ".zst", ".mgz")  # of content that is not compressed
_SINGLE = re.compile(r"\.nii(\.(gz|bz2|zst))?$", re.IGNORECASE)  # of which nibabel opens the file itself alone
_DEFLATE_RATIO = 1032  # the most that deflate shrinks anything
_OTHER_RATIO = 100_000  # bzip2 and zstd shrink zeros further
_HEADER_BYTES = 65536  # of a text header, more than any has
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class ImageFile:
    """An opened file; no voxel of it was read.

    Attributes:
        path: The file; of a DICOM series the first of its files by name.
        shape: As stored, x first; a last axis of channels included.
        spacing: One number per stored axis: mm, lengths of the affine's columns; then s. Empty where the format has none.
        dtype: As stored, before any scaling.
        affine: [4, 4] voxel -> mm, RAS+; None where the format has none.
        is_channels: The fourth axis is known to be channels.
        read: Place on the fourth axis (0 without one) -> [X, Y, Z] float32.
        tags: What a DICOM header says of modality, organ, patient and series.
        notes: What its header says of its place otherwise than the affine, which counts.
        step: Between two values that its storage can hold, where that is whole numbers with a slope; else 0.
        padding: Voxels as read -> where the header says that nothing was measured; None where it says nothing.
    """

    path: str
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    dtype: np.dtype
    affine: np.ndarray | None
    is_channels: bool
    read: Callable[[int], np.ndarray]
    tags: dict[str, str] | None = None
    notes: tuple[str, ...] = ()
    step: float = 0.0
    padding: Callable[[np.ndarray], np.ndarray] | None = None


def check_size(path: str | Path, announced: int, held: int, ratio: int = 1) -> None:
    """Refuse a header that asks for more memory than the file can fill, before any is taken.

    Args:
        path: Named in the message.
        announced: Bytes of voxels by the header.
        held: Bytes of the file that has them.
        ratio: The most by which they may be compressed.

    Raises:
        BadVolume: The file is too short.
    """
    if announced > held * ratio:
        raise BadVolume(f"{path}: truncated, or its header is wrong: {announced:,} bytes of voxels in {held:,}", "truncated")


def open_nibabel(path: str) -> ImageFile:
    """NIfTI, Analyze, MGH and what else nibabel knows.

    Raises:
        BadVolume: Shorter than its header says.
        Exception: Whatever nibabel raises (`bounded.foreign`).
    """
    _check_files(path)
    image, affine, notes = _loaded(path)
    if not isinstance(image, nib.spatialimages.SpatialImage):
        raise BadVolume(f"{path}: holds no volume on a grid ({type(image).__name__})", "not_an_image")
    shape = tuple(int(s) for s in image.shape)
    data = Path(image.file_map["image"].filename or path)
    dtype = image.get_data_dtype()
    num_bytes = math.prod(shape) * dtype.itemsize
    check_size(path, num_bytes, data.stat().st_size, _ratio(data))
    is_vector = len(shape) == 5 and shape[3] == 1 and shape[4] > 1  # what ITK writes for several channels
    lead = (slice(None),) * 3
    voxels_of = _checked_voxels(image, data, num_bytes)

    def read(fourth: int) -> np.ndarray:
        index = (*lead, 0, fourth) if is_vector else (*lead, fourth, *[0] * len(shape))[: len(shape)]
        return _as_float32(voxels_of()[index])

    shape_kept = (*shape[:3], shape[4]) if is_vector else shape
    spacing = (*column_spacing(affine), *(float(z) for z in image.header.get_zooms()[3:]))
    step = float(getattr(image.dataobj, "slope", 1.0)) if np.issubdtype(dtype, np.integer) else 0.0
    return ImageFile(path, shape_kept, spacing, dtype, affine, is_vector, read, notes=notes, step=abs(step))


def _loaded(path: str) -> tuple[Any, np.ndarray, tuple[str, ...]]:
    """nibabel's image, the affine that counts, and what the header says otherwise; a time axis is read in one pass."""
    found = load_nifti(path)
    if found is not None:
        return found[0], *nifti_place(path, found[1])
    if is_packed(path):
        with open_content(Path(path)) as file:
            check_start(path, file.read(352))
    image = _mgh(path) or nib.load(path, keep_file_open=True)
    affine = getattr(image, "affine", None)
    if not isinstance(image.header, nib.analyze.AnalyzeHeader) or affine is None:
        return image, np.full((4, 4), np.nan) if affine is None else affine, ()
    with image.file_map["header"].get_prepare_fileobj("rb") as file:  # nibabel's own reader replaces a zero by 1
        said = type(image.header).from_fileobj(file, check=False).get_zooms()[:3]
    if np.allclose(affine, image.header.get_best_affine()):  # no .mat file beside it
        check_positive(path, said)
    own = column_spacing(affine)
    note = f"its header's spacing is {shown_mm(said)}, its affine's {shown_mm(own)}"
    return image, affine, (note,) if differs(own, said) else ()


def _mgh(path: str) -> Any:
    """A `.mgh` or `.mgz` whose compression is not its ending's; None for everything else."""
    is_compressed = {".mgh": False, ".mgz": True}.get(Path(path).suffix.lower())
    if is_compressed is None or is_compressed == (compression(Path(path)) == ".gz"):
        return None
    file = open_content(Path(path))
    return nib.MGHImage.from_file_map({"image": nib.FileHolder(fileobj=file)})


def _ratio(data: Path) -> int:
    """The most by which a file's voxels may be compressed."""
    found, suffix = compression(data), data.suffix.lower()
    if found:
        return _DEFLATE_RATIO if found == ".gz" else _OTHER_RATIO
    return 1 if suffix in _PLAIN_SUFFIXES else _OTHER_RATIO


def _check_files(path: str) -> None:
    """Look at every file that nibabel would open for a path before it does.

    Raises:
        OSError: One is not there, or no regular file.
    """
    check_regular(path)
    if _SINGLE.search(path):
        return
    for kind in nib.imageclasses.all_image_classes:
        try:
            beside = kind.filespec_to_file_map(path)
        except ImageFileError:
            continue  # no name of this kind
        for holder in beside.values():
            if holder.filename and Path(holder.filename).exists():
                check_regular(holder.filename)


def _checked_voxels(image: Any, data: Path, num_bytes: int) -> Callable[[], Any]:
    """What gives the voxels of an opened image, of compressed files once every checksum in them was compared.

    nibabel reads a stream only as far as the last voxel, and the checksum stands behind it. A single volume is made from the
    bytes that were checked, in one pass; of several, which are read one by one, the files are read through once before.
    """
    files = {Path(holder.filename or data) for holder in image.file_map.values()}  # without a name: opened by its content
    packed = [file for file in files if file.exists() and is_packed(file)]
    proxy = image.dataobj
    limit = num_bytes + int(getattr(proxy, "offset", 0)) + MAX_TRAILING_BYTES

    @cache
    def check(leave_out: Path | None = None) -> None:
        for file in packed:
            if file != leave_out:
                check_expansion(file, limit if file == data else MAX_TEXT_BYTES)

    def voxels() -> Any:
        if data not in packed or type(proxy) is not ArrayProxy or math.prod(image.shape[3:]) > 1:
            check()
            return proxy
        check(data)
        whole = io.BytesIO(b"".join(expanded(data, limit)))
        return ArrayProxy(whole, (proxy.shape, proxy.dtype, proxy.offset, proxy.slope, proxy.inter), order=proxy.order)

    return voxels


def _as_float32(voxels: np.ndarray) -> np.ndarray:
    """A copy; what a float64 holds beyond float32's range becomes its end, not infinite."""
    voxels = np.asarray(voxels)
    if voxels.dtype.kind == "f" and voxels.dtype.itemsize > 4:
        ends = np.finfo(np.float32)
        voxels = np.where(np.isfinite(voxels), np.clip(voxels, ends.min, ends.max), voxels)
    return np.array(voxels, dtype=np.float32)


def simpleitk() -> Any:
    """The library, imported where it is used.

    Raises:
        BadVolume: It is not installed.
    """
    with needed_for("reading NRRD, MetaImage or DICOM", READER_MISSING):
        import SimpleITK
    return SimpleITK


def open_itk(path: str, image_io: str = "") -> ImageFile:
    """NRRD and MetaImage, with the voxels inside or beside the header.

    Args:
        path: The file.
        image_io: SimpleITK's name of the format, needed where an upper-case ending hides it; empty: it finds out.

    Raises:
        BadVolume: Shorter than its header says, voxels spread over several files, no real numbers, no SimpleITK.
        Exception: Whatever SimpleITK raises (`bounded.foreign`).
    """
    sitk = simpleitk()
    stored = _stored_voxels(Path(path))
    reader = sitk.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(path)
    reader.ReadImageInformation()
    size, num_channels = tuple(reader.GetSize()), reader.GetNumberOfComponents()
    dtype = _dtype(sitk.GetPixelIDValueAsString(reader.GetPixelID()), path)
    num_bytes = math.prod(size) * num_channels * dtype.itemsize
    check_size(path, num_bytes, stored.file.stat().st_size, 1 if stored.is_plain else _DEFLATE_RATIO)
    check = cache(partial(check_expansion, stored.file, num_bytes + MAX_TRAILING_BYTES, stored.start))

    is_as_stored = (stored.slope, stored.intercept) == (1.0, 0.0)

    def read(fourth: int) -> np.ndarray:
        if stored.is_gzip:
            check()  # to the checksum, which ITK does not look at
        if len(size) == 4:
            reader.SetExtractSize([*size[:3], 0])
            reader.SetExtractIndex([0, 0, 0, fourth])
        image = reader.Execute()
        if num_channels > 1:
            image = sitk.VectorIndexSelectionCast(image, fourth, sitk.sitkFloat32)
        values = sitk.GetArrayViewFromImage(image).T
        return _as_float32(values if is_as_stored else values * stored.slope + stored.intercept)

    ndim, spacing = len(size), tuple(reader.GetSpacing())
    shape = (*size, num_channels) if num_channels > 1 else size
    if ndim < 3:
        return ImageFile(path, shape, spacing, dtype, None, num_channels > 1, read)
    mm, notes = of_text_header(path, header_text(path, _HEADER_BYTES))
    check_positive(path, spacing[:3])
    direction = np.array(reader.GetDirection()).reshape(ndim, ndim)[:3, :3]
    affine = np.diag([mm, mm, mm, 1.0]) @ lps_affine(direction, spacing, reader.GetOrigin())
    own, said = column_spacing(affine), tuple(mm * s for s in spacing[:3])
    if differs(own, said):
        notes = (*notes, f"its header's spacing is {shown_mm(said)}, its affine's {shown_mm(own)}")
    return ImageFile(path, shape, (*own, *spacing[3:]), dtype, affine, num_channels > 1, read, notes=notes)


def lps_affine(direction: np.ndarray, spacing: tuple[float, ...], origin: tuple[float, ...]) -> np.ndarray:
    """[4, 4] voxel -> mm RAS+, from ITK's and DICOM's axes (towards left, back, head).

    Args:
        direction: [3, 3], a column per voxel axis.
        spacing: mm.
        origin: mm, of the first voxel's centre.
    """
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS @ direction * np.array(spacing[:3])
    affine[:3, 3] = _LPS_TO_RAS @ np.array(origin[:3])
    return affine


def _dtype(words: str, path: str) -> np.dtype:
    """From SimpleITK's description, as "vector of 16-bit signed integer"."""
    found = re.fullmatch(r"(?:vector of )?(\d+)-bit (unsigned integer|signed integer|float)", words)
    if not found:
        raise BadVolume(f"{path}: voxels of type {words} are not real numbers", "not_real_numbers")
    return np.dtype(f"{ {'u': 'u', 's': 'i', 'f': 'f'}[found[2][0]] }{int(found[1]) // 8}")


@dataclass(frozen=True)
class _Stored:
    """Where the voxels of a NRRD or MetaImage header are.

    Attributes:
        file: The header's file or the one beside it.
        is_plain: Stored as they are.
        is_gzip: Compressed with gzip or zlib.
        start: Where a compressed stream begins in the file.
        slope, intercept: Of MetaImage, which ITK leaves out: what stored values become.
    """

    file: Path
    is_plain: bool
    is_gzip: bool
    start: int
    slope: float = 1.0
    intercept: float = 0.0


def _stored_voxels(path: Path) -> _Stored:
    """By the header's text, before ITK opens what it names.

    Raises:
        BadVolume: Several files, or a header that does not end.
        OSError: It or the file that it names cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        text = file.read(_HEADER_BYTES).decode("latin-1")
    if text.startswith("NRRD"):
        ends = [m.end() for m in re.finditer(r"\n\n|\r\n\r\n", text)][:1]
        end = ends[0] if ends else len(text)
        named = re.findall(r"(?im)^\s*data ?file:\s*(.+?)\s*$", text[:end])
        encoding = re.search(r"(?im)^\s*encoding:\s*(\w+)", text[:end])
        is_plain = bool(encoding and encoding[1].lower() == "raw")
        is_gzip = bool(encoding and encoding[1].lower() in ("gz", "gzip"))
        skipped = re.search(r"(?im)^\s*line ?skip:\s*(\d+)", text[:end])
        ended = bool(ends or named) or len(text) < _HEADER_BYTES
    else:
        found = re.search(r"(?im)^\s*ElementDataFile\s*=\s*(.+?)[ \t\r]*$\n?", text)
        named, end, skipped = [found[1]] if found else [], found.end() if found else 0, None
        is_plain = not re.search(r"(?im)^\s*CompressedData\s*=\s*True", text[:end])
        is_gzip, ended = not is_plain, bool(found) or len(text) < _HEADER_BYTES
        for line in re.findall(r"(?i).*NDims.*", text[: end or None]):
            if not re.fullmatch(r"\s*NDims\s*=\s*([1-9]|10)\s*", line):  # of others ITK writes beyond its own arrays
                raise BadVolume(f"{path}: {line.strip()[:80]!r}: an image has 1 to 10 axes: damaged", "damaged")
    if not ended:
        raise BadVolume(f"{path}: its header does not end within {_HEADER_BYTES:,} bytes", "unsupported")
    if any(name.upper().startswith("LIST") or "%" in name for name in named):
        raise BadVolume(f"{path}: its voxels are spread over several files: convert it to one", "unsupported")
    beside = [path.parent / name for name in named if name.upper() != "LOCAL"]
    for other in beside:
        check_regular(other)
    data = beside[0] if beside else path
    start = _after_lines(data, 0 if beside else end, int(skipped[1]) if skipped else 0)
    scale = dict(re.findall(r"(?im)^\s*ElementToIntensityFunction(Slope|Offset)\s*=\s*(\S+)", text[:end]))
    slope, intercept = float(scale.get("Slope", 1)), float(scale.get("Offset", 0))
    if slope == 0 or not math.isfinite(slope) or not math.isfinite(intercept):
        raise BadVolume(
            f"{path}: ElementToIntensityFunction of slope {slope} and offset {intercept} gives no values", "unsupported"
        )
    return _Stored(data, is_plain, is_gzip, start, slope, intercept)


def _after_lines(path: Path, start: int, num_lines: int) -> int:
    """Where in a file the lines end that come before what is wanted."""
    with open_regular(path) as file:
        file.seek(start)
        for _ in range(num_lines):
            if not file.readline(_HEADER_BYTES):
                break
        return file.tell()


def open_numpy(path: str) -> ImageFile:
    """An array [X, Y, Z] or [X, Y, Z, T or C] of `.npy` or the only one of `.npz`; it has no spacing and no orientation.

    Raises:
        BadVolume: Shorter than its header says, several arrays.
        Exception: Whatever NumPy raises (`bounded.foreign`).
    """
    check_regular(path)
    if path.lower().endswith(".npy"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # refuses a file that is too short
        return _of_array(path, array.shape, array.dtype, lambda: array)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) != 1:
            raise BadVolume(f"{path}: holds {len(members)} arrays: keep one to a file", "unsupported")
        with archive.open(members[0]) as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(file)
    held = min(members[0].compress_size, Path(path).stat().st_size)
    num_bytes = math.prod(shape) * dtype.itemsize
    check_size(path, num_bytes, held, 1 if members[0].compress_type == 0 else _DEFLATE_RATIO)

    def load() -> np.ndarray:
        with zipfile.ZipFile(path) as archive, archive.open(members[0]) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(MAX_TRAILING_BYTES):  # to the end, where zipfile compares the checksum
                raise BadVolume(f"{path}: holds more than the array that its header describes: damaged", "damaged")
            return array

    return _of_array(path, shape, dtype, load)


def _of_array(path: str, shape: tuple[int, ...], dtype: np.dtype, load: Callable[[], np.ndarray]) -> ImageFile:
    def read(fourth: int) -> np.ndarray:
        array = load()
        index = (slice(None),) * 3 + (fourth, *[0] * array.ndim)[: array.ndim - 3]
        return _as_float32(array[index])

    return ImageFile(path, tuple(int(s) for s in shape), (), dtype, None, False, read)


def is_second_half(name: str, names: Collection[str]) -> bool:
    """The voxels of a pair whose header is among the names too."""
    found = PAIR.fullmatch(name)
    if not found or found["half"].lower() != "img":
        return False
    return f"{found['stem']}.{'HDR' if found['half'].isupper() else 'hdr'}" in names


def voxels_beside(path: Path) -> list[Path]:
    """The file that has the voxels of a NRRD or MetaImage header; none where they are in it, or it cannot be read."""
    try:
        data = _stored_voxels(path).file
    except (BadVolume, OSError, ValueError):  # ValueError: a number or a name that none is
        return []
    return [data] if data != path else []
