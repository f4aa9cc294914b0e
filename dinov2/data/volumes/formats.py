"""The one table of file formats: their endings, what opens them, of which files a volume is made, what reading them needs.

A new format is a row of `FORMATS`, a function that opens it in a module of readers, and a row of the table in docs/datasets.md
(a test holds the two equal). Endings are compared without regard to case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dinov2.data.volumes.dicom import DICOM_SUFFIXES, is_dicom, open_series, other_slices
from dinov2.data.volumes.nifti import other_half
from dinov2.data.volumes.readers import ImageFile, is_second_half, open_itk, open_nibabel, open_numpy, voxels_beside


def _itself_alone(path: Path) -> list[Path]:
    return []


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Attributes:
        name: As people call it.
        suffixes: Endings of the files that are opened, lower-case.
        open: A path to its header, checked, with voxels on demand.
        other_files: The files beside a path that its volume is made from as well: whatever changes the volume changes one of
            them. A header that cannot be read has none.
        needs: Packages by the name they are imported by, besides those that everything needs.
    """

    name: str
    suffixes: tuple[str, ...]
    open: Callable[[str], ImageFile]
    other_files: Callable[[Path], list[Path]] = _itself_alone
    needs: tuple[str, ...] = ()


NIFTI = Format("NIfTI", (".nii", ".nii.gz", ".nii.bz2", ".nii.zst"), open_nibabel)
PAIR = Format("Analyze", (".hdr", ".img", ".img.gz", ".img.bz2", ".img.zst"), open_nibabel, other_half)
MGH = Format("MGH", (".mgh", ".mgz"), open_nibabel)
NRRD = Format("NRRD", (".nrrd", ".nhdr"), open_itk, voxels_beside, ("SimpleITK",))
METAIMAGE = Format("MetaImage", (".mha", ".mhd"), partial(open_itk, image_io="MetaImageIO"), voxels_beside, ("SimpleITK",))
NUMPY = Format("NumPy", (".npy", ".npz"), open_numpy)
DICOM = Format("DICOM", DICOM_SUFFIXES, open_series, other_slices, ("pydicom", "SimpleITK"))  # also known by a mark in the file
FORMATS = (NIFTI, PAIR, MGH, NRRD, METAIMAGE, NUMPY, DICOM)
FORMAT_NAMES = " or ".join([", ".join(f.name for f in FORMATS[:-1]), FORMATS[-1].name])

READING = 3  # raised with every change of what is read from the same files; part of the cache's keys and the index's stamps

_BY_SUFFIX = dict(sorted(((s, f) for f in FORMATS for s in f.suffixes), key=lambda row: -len(row[0])))  # .nii.gz before .gz


def format_by_name(path: str | Path) -> Format | None:
    """The format that a file's ending is of; nothing is opened."""
    suffix = _suffix(path)
    return _BY_SUFFIX[suffix] if suffix else None


def format_of(path: str | Path) -> Format:
    """The format that a path is opened as: a folder as DICOM, a file by its ending.

    Without a known ending a file is DICOM by its mark, else what nibabel finds.

    Raises:
        OSError: Without a known ending, it cannot be read.
    """
    if os.path.isdir(path):
        return DICOM
    return format_by_name(path) or (DICOM if is_dicom(path) else NIFTI)


def stem(path: str | Path) -> str:
    """A file's name without the ending of its format."""
    name = Path(path).name
    return name[: len(name) - len(_suffix(path))]


def _suffix(path: str | Path) -> str:
    """The known ending of a name, lower-case; empty without one."""
    name = Path(path).name.lower()
    return next((s for s in _BY_SUFFIX if name.endswith(s)), "")


def source_files(path: Path) -> list[Path]:
    """Every file that a volume is made from, `path` first where it is one.

    Raises:
        OSError: Without a known ending, it cannot be read.
    """
    others = format_of(path).other_files(path)
    return others if path.is_dir() else [path, *others]


def is_volume_file(name: str, names: Collection[str]) -> bool:
    """A file that is a volume by its name and the names beside it: not hidden, no slice, of a pair the header.

    Voxels beside a header of NRRD or MetaImage have no known ending (`.raw`, `.zraw`).
    """
    found = format_by_name(name)
    return found not in (None, DICOM) and not name.startswith(".") and not is_second_half(name, names)


def is_scan_path(path: str | Path) -> bool:
    """Whether a path can name a scan: a file, or a folder with DICOM files in it. What is wrong in them opening them says."""
    try:
        return os.path.isfile(path) or (os.path.isdir(path) and _has_slices(path))
    except OSError:  # may not be read
        return True


def scans_in(folder: Path) -> list[Path]:
    """The scans of a folder, by name: files that are a volume each, and the folders in it that have DICOM files.

    DICOM files that lie in it themselves are another matter: `dicom.first_slices`.

    Raises:
        OSError: It, or what is in it, cannot be read.
    """
    found = {path.name: path for path in folder.iterdir()}
    files = {name for name, path in found.items() if path.exists() and not path.is_dir()}  # a pipe too: opening it names it
    scans = [name for name in files if is_volume_file(name, files)]
    scans += [n for n, path in found.items() if not n.startswith(".") and path.is_dir() and _has_slices(path)]
    return [found[name] for name in sorted(scans)]


def _has_slices(folder: str | Path) -> bool:
    with os.scandir(folder) as entries:
        return any(format_by_name(e.name) in (None, DICOM) and e.is_file() and is_dicom(e.path) for e in entries)
