"""Image files of several formats behind one face: a header that was held against the file's size, voxels on demand.

NIfTI and its relatives by nibabel, NRRD and MetaImage by SimpleITK, NumPy arrays; DICOM series are in `dicom.py`. Which ending
is which format's is in `formats.py`.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.tripwire import TripWireError

from dinov2.data.volumes.nifti import PAIR, compression, load_nifti, nifti_place, open_content
from dinov2.data.volumes.places import check_positive, column_spacing, differs, header_text, of_text_header, shown_mm
from dinov2.errors import BadVolume

# what reading a damaged, truncated or foreign file raises; RuntimeError is SimpleITK's, and zipfile's for encrypted members,
# TripWireError nibabel's where the package for a compression is missing
READ_ERRORS = (
    OSError, EOFError, zlib.error, ImageFileError, HeaderDataError, ValueError, MemoryError, OverflowError, RuntimeError,
    zipfile.BadZipFile, TripWireError,
)  # fmt: skip

_PLAIN_SUFFIXES = (".nii", ".img", ".hdr", ".mgh", ".gz", ".bz2", ".zst", ".mgz")  # of content that is not compressed
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


def first_line(err: BaseException) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0] or type(err).__name__


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
        Exception: One of `READ_ERRORS`.
    """
    image, affine, notes = _loaded(path)
    if not isinstance(image, nib.spatialimages.SpatialImage):
        raise BadVolume(f"{path}: holds no volume on a grid ({type(image).__name__})", "not_an_image")
    shape = tuple(int(s) for s in image.shape)
    data = Path(image.file_map["image"].filename or path)
    dtype = image.get_data_dtype()
    check_size(path, math.prod(shape) * dtype.itemsize, data.stat().st_size, _ratio(data))
    is_vector = len(shape) == 5 and shape[3] == 1 and shape[4] > 1  # what ITK writes for several channels
    lead = (slice(None),) * 3

    def read(fourth: int) -> np.ndarray:
        index = (*lead, 0, fourth) if is_vector else (*lead, fourth, *[0] * len(shape))[: len(shape)]
        return np.array(image.dataobj[index], dtype=np.float32)

    shape_kept = (*shape[:3], shape[4]) if is_vector else shape
    spacing = (*column_spacing(affine), *(float(z) for z in image.header.get_zooms()[3:]))
    step = float(getattr(image.dataobj, "slope", 1.0)) if np.issubdtype(dtype, np.integer) else 0.0
    return ImageFile(path, shape_kept, spacing, dtype, affine, is_vector, read, notes=notes, step=abs(step))


def _loaded(path: str) -> tuple[Any, np.ndarray, tuple[str, ...]]:
    """nibabel's image, the affine that counts, and what the header says otherwise; a time axis is read in one pass."""
    found = load_nifti(path)
    if found is not None:
        return found[0], *nifti_place(path, found[1])
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


def simpleitk() -> Any:
    """The library, imported where it is used.

    Raises:
        BadVolume: It is not installed.
    """
    try:
        import SimpleITK
    except ImportError as err:
        raise BadVolume("NRRD, MetaImage and DICOM need SimpleITK: pip install SimpleITK", "reader_missing") from err
    return SimpleITK


def open_itk(path: str, image_io: str = "") -> ImageFile:
    """NRRD and MetaImage, with the voxels inside or beside the header.

    Args:
        path: The file.
        image_io: SimpleITK's name of the format, needed where an upper-case ending hides it; empty: it finds out.

    Raises:
        BadVolume: Shorter than its header says, voxels spread over several files, no real numbers, no SimpleITK.
        Exception: One of `READ_ERRORS`.
    """
    sitk = simpleitk()
    reader = sitk.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(path)
    reader.ReadImageInformation()
    size, num_channels = tuple(reader.GetSize()), reader.GetNumberOfComponents()
    dtype = _dtype(sitk.GetPixelIDValueAsString(reader.GetPixelID()), path)
    data, is_plain = _data_file(Path(path))
    check_size(path, math.prod(size) * num_channels * dtype.itemsize, data.stat().st_size, 1 if is_plain else _DEFLATE_RATIO)

    def read(fourth: int) -> np.ndarray:
        if len(size) == 4:
            reader.SetExtractSize([*size[:3], 0])
            reader.SetExtractIndex([0, 0, 0, fourth])
        image = reader.Execute()
        if num_channels > 1:
            image = sitk.VectorIndexSelectionCast(image, fourth, sitk.sitkFloat32)
        return np.array(sitk.GetArrayViewFromImage(image).T, dtype=np.float32)

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


def _data_file(path: Path) -> tuple[Path, bool]:
    """The file that has the voxels of a NRRD or MetaImage header, and whether they are stored as they are."""
    with path.open("rb") as file:
        text = file.read(_HEADER_BYTES).decode("latin-1")
    if text.startswith("NRRD"):
        text = text.split("\n\n")[0].split("\r\n\r\n")[0]
        found = re.search(r"(?im)^data ?file:\s*(.+?)\s*$", text)
        plain = bool(re.search(r"(?im)^encoding:\s*raw\b", text))
    else:
        found = re.search(r"(?im)^ElementDataFile\s*=\s*(.+?)\s*$", text)
        plain = not re.search(r"(?im)^CompressedData\s*=\s*True", text)
    name = found[1] if found else "LOCAL"
    if name.upper().startswith("LIST") or "%" in name:
        raise BadVolume(f"{path}: its voxels are spread over several files: convert it to one", "unsupported")
    return (path if name.upper() == "LOCAL" else path.parent / name), plain


def open_numpy(path: str) -> ImageFile:
    """An array [X, Y, Z] or [X, Y, Z, T or C] of `.npy` or the only one of `.npz`; it has no spacing and no orientation.

    Raises:
        BadVolume: Shorter than its header says, several arrays.
        Exception: One of `READ_ERRORS`.
    """
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
    check_size(path, math.prod(shape) * dtype.itemsize, held, 1 if members[0].compress_type == 0 else _DEFLATE_RATIO)

    def load() -> np.ndarray:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[arrays.files[0]]

    return _of_array(path, shape, dtype, load)


def _of_array(path: str, shape: tuple[int, ...], dtype: np.dtype, load: Callable[[], np.ndarray]) -> ImageFile:
    def read(fourth: int) -> np.ndarray:
        array = load()
        index = (slice(None),) * 3 + (fourth, *[0] * array.ndim)[: array.ndim - 3]
        return np.array(array[index], dtype=np.float32)

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
        data, _ = _data_file(path)
    except (BadVolume, OSError):
        return []
    return [data] if data != path and data.exists() else []
