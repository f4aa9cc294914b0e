"""NIfTI headers as they stand in the file, and the one affine that they choose; content found by first bytes, not by ending.

Source: the standard's nifti1.h, methods 1 to 3 of "3D image (volume) orientation and location in space".
"""

from __future__ import annotations

import bz2
import gzip
import io
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dinov2.data.volumes.bounded import MAX_TEXT_BYTES
from dinov2.data.volumes.grids import farthest_corner_mm
from dinov2.data.volumes.places import SAME, check_affine, check_positive, column_spacing, differs, shown_mm
from dinov2.errors import BadVolume
from dinov2.geometry import Spacing, triple

PAIR = re.compile(r"(?P<stem>.+)\.(?P<half>hdr|img)(?P<compression>\.(?:gz|bz2|zst))?", re.IGNORECASE)
_SPACE_UNITS_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 1e-3}  # unknown counts as mm, metre, mm, micron
_HEADER_BYTES = 544  # of the longer one, NIfTI-2's, and the four after it that say whether extensions follow
_SAME_PLACE = 0.5  # of the smallest voxel edge, by which sform and qform may lie apart
_COMPRESSED: dict[str, tuple[bytes, Callable[[Path], Any] | None]] = {  # by ending: how it begins, and what reads it
    ".gz": (b"\x1f\x8b", gzip.open),
    ".bz2": (b"BZh", bz2.open),
    ".zst": (b"\x28\xb5\x2f\xfd", None),
}


def compression(path: Path) -> str:
    """The ending that a file's first bytes belong to, of those that nibabel decompresses; empty for none.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        first = file.read(4)
    return next((ending for ending, (mark, _) in _COMPRESSED.items() if first.startswith(mark)), "")


def load_nifti(path: str) -> tuple[Any, Any] | None:
    """A NIfTI file as nibabel's image without an affine, and its header as stored; None for another format.

    nibabel's own `load` refuses a quaternion a hair off, and content whose compression is not its ending's.

    Args:
        path: The file; of a pair either half.

    Raises:
        Exception: Whatever nibabel raises (`bounded.foreign`).
    """
    halves = sorted([Path(path), *other_half(Path(path))], key=lambda half: ".img" in half.name.lower())  # the header first
    if not halves[0].is_file():
        return None
    found = compression(halves[0])
    with open_content(halves[0], found) as file:
        block = file.read(_HEADER_BYTES)
    if found:
        check_start(path, block)
    classes = {b"1": (nib.Nifti1Image, nib.Nifti1Pair), b"2": (nib.Nifti2Image, nib.Nifti2Pair)}
    magic = next((m for m in (block[344:348], block[4:8]) if m[:2] in (b"n+", b"ni") and m[2:3] in classes), None)
    if magic is None:
        return None
    kind = classes[magic[2:3]][len(halves) - 1]
    has_extensions = any(block[kind.header_class.sizeof_hdr :][:1])
    headers = []
    for check in (True, False):
        with open_content(halves[0], found) if has_extensions else io.BytesIO(block) as file:
            headers.append(kind.header_class.from_fileobj(file, check=check))
    header, stored = headers
    _settle_quaternion(header)
    voxels = halves[-1]
    found = found if voxels == halves[0] else compression(voxels)
    place = str(voxels) if found == _by_name(voxels) else open_content(voxels, found)
    data = kind.ImageArrayProxy(place, header.copy(), keep_file_open=True)
    names = {"image": str(voxels)} | ({"header": str(halves[0])} if len(halves) > 1 else {})
    return kind(data, None, header, file_map=kind.make_file_map(names)), stored


def _by_name(path: Path) -> str:
    suffix = path.suffix.lower()
    return ".gz" if suffix == ".mgz" else suffix if suffix in _COMPRESSED else ""


def check_start(path: str, header: bytes) -> None:
    """Refuse a compressed file whose header says that its voxels come after more bytes than a header has; all are expanded.

    Args:
        path: For messages.
        header: Its first bytes, expanded.

    Raises:
        BadVolume: It does.
    """
    start = _first_voxel(header)
    if start > MAX_TEXT_BYTES:
        raise BadVolume(f"{path}: its header says that {start:,} bytes come before the voxels: damaged", "damaged")


def _first_voxel(header: bytes) -> float:
    """Where the voxels of a NIfTI file begin, by its first bytes; 0 of anything else."""
    for order in "<>":
        if header[:4] == struct.pack(order + "i", 348) and len(header) >= 112:
            return struct.unpack_from(order + "f", header, 108)[0]
        if header[:4] == struct.pack(order + "i", 540) and len(header) >= 176:
            return struct.unpack_from(order + "q", header, 168)[0]
    return 0


def open_content(path: Path, found: str | None = None) -> Any:
    """The content, decompressed by what it is.

    Args:
        path: The file.
        found: As of `compression`, where that is known.
    """
    found = compression(path) if found is None else found
    if found == _by_name(path):
        return nib.openers.ImageOpener(str(path))
    if not found:
        return path.open("rb")
    read = _COMPRESSED[found][1]
    if read is None:
        raise BadVolume(f"{path}: its content is compressed as {found}: rename it to end in {found}", "unreadable")
    return read(path)


def _quaternion(header: Any) -> np.ndarray:
    """[4] of length 1: the three stored numbers, where rounding has made them a hair too long brought back.

    Raises:
        BadVolume: They are not numbers, or too long for rounding.
    """
    bcd = np.array([header[f"quatern_{axis}"] for axis in "bcd"], dtype=np.float64)
    length = float(np.linalg.norm(bcd))
    if not length <= 1 + SAME:
        shown = ", ".join(f"{x:.6g}" for x in bcd)
        raise BadVolume(f"its qform is no rotation (quaternion {shown}): correct the header", "geometry")
    bcd /= max(1.0, length)
    return np.array([math.sqrt(max(0.0, 1.0 - float(bcd @ bcd))), *bcd])


def _settle_quaternion(header: Any) -> None:
    """So that nibabel, which is stricter, can write the header of a result."""
    try:
        quaternion = _quaternion(header)
    except BadVolume:
        return
    if np.linalg.norm([header[f"quatern_{axis}"] for axis in "bcd"]) > 1:
        for axis, value in zip("bcd", quaternion[1:], strict=True):
            header[f"quatern_{axis}"] = value


def _pixdim(header: Any) -> Spacing:
    return triple(float(s) for s in header["pixdim"][1:4])


def _qform(header: Any) -> np.ndarray:
    """[4, 4] in the header's units.

    Raises:
        BadVolume: It is no rotation, or has no spacing.
    """
    check_positive("its qform", _pixdim(header))
    flip = -1.0 if header["pixdim"][0] < 0 else 1.0
    affine = np.eye(4)
    affine[:3, :3] = nib.quaternions.quat2mat(_quaternion(header)) * _pixdim(header) * (1.0, 1.0, flip)
    affine[:3, 3] = [header[f"qoffset_{axis}"] for axis in "xyz"]
    return affine


def nifti_place(path: str, stored: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """[4, 4] voxel -> mm (RAS+) by the form that the header's codes choose, and what the header says otherwise.

    The sform where its code is set and it is not empty, else the qform where its code is set, else the spacing alone, about
    the middle.

    Args:
        path: For messages.
        stored: The header as it stands in the file; nibabel's checks replace spacings.

    Raises:
        BadVolume: What the codes choose does not say where the voxels lie.
    """
    unit = int(stored["xyzt_units"]) & 7
    mm, notes = _SPACE_UNITS_MM.get(unit, 1.0), []
    if unit not in _SPACE_UNITS_MM:
        notes.append(f"its header's unit of length ({unit}) has no meaning: mm is taken")
    sform, name = stored.get_sform(), "sform"
    if int(stored["sform_code"]) > 0 and not sform[:3, :3].any():
        notes.append("its sform is chosen and empty: it counts as none")
    try:
        if int(stored["sform_code"]) > 0 and sform[:3, :3].any():
            affine = sform
            check_affine("its sform", affine)
            notes += _beside_sform(stored, affine)
        elif int(stored["qform_code"]) > 0:
            affine, name = _qform(stored), "qform"
        else:
            check_positive("its header", _pixdim(stored))
            affine, name = stored.get_base_affine(), "spacing"
        check_affine(f"its {name}", affine)
    except BadVolume as err:
        raise BadVolume(f"{path}: {err}", err.reason) from err
    own, said = column_spacing(affine), _pixdim(stored)
    if differs(own, said):
        notes.append(f"its header's spacing is {shown_mm(mm * s for s in said)}, its {name}'s {shown_mm(mm * s for s in own)}")
    return np.diag([mm, mm, mm, 1.0]) @ affine, tuple(notes)


def _beside_sform(stored: Any, affine: np.ndarray) -> list[str]:
    """Where the qform claims the same space as the sform that counts, or mirrors it, and puts the voxels elsewhere."""
    code = int(stored["qform_code"])
    if code <= 0 or differs(column_spacing(affine), _pixdim(stored)):  # a spacing that differs is said by itself
        return []
    try:
        other = _qform(stored)
    except BadVolume as err:
        return [f"{err}; its sform counts"]
    if not np.isfinite(other).all():
        return ["its qform is not finite; its sform counts"]
    mirrored = np.linalg.det(affine[:3, :3]) * np.linalg.det(other[:3, :3]) < 0
    apart = farthest_corner_mm(triple(int(n) for n in [*stored.get_data_shape(), 1, 1][:3]), affine, other)
    if (mirrored or code == int(stored["sform_code"])) and apart > _SAME_PLACE * min(column_spacing(affine)):
        what = "mirrored to" if mirrored else f"up to {apart:.3g} (in its units) from"
        return [f"its qform puts the voxels {what} where its sform does, which counts"]
    return []


def result_header(path: str, affine: np.ndarray) -> Any:
    """The header for a result on a file's grid: its own, or where that says anything but the affine, set right; of NIfTI.

    Args:
        path: The file; of a pair either half.
        affine: [4, 4], what `nifti_place` made of it.

    Returns:
        A copy; None for another format.
    """
    found = load_nifti(path)
    if found is None:
        return None
    header, (_, notes) = found[0].header.copy(), nifti_place(path, found[1])
    if notes or int(header["xyzt_units"]) & 7 not in (0, 2):
        header["xyzt_units"] = int(header["xyzt_units"]) & ~7 | 2  # mm, and the time's as it was
        header.set_qform(affine, code=0)  # first, since the spacing is its part
        header.set_sform(affine, code=int(header["sform_code"]) if int(header["sform_code"]) > 0 else 2)
    return header


def other_half(path: Path) -> list[Path]:
    """The other file of a NIfTI or Analyze pair, as nibabel looks for it: of the same compression and case of the ending."""
    found = PAIR.fullmatch(path.name)
    if not found:
        return []
    half = "img" if found["half"].lower() == "hdr" else "hdr"
    half = half.upper() if found["half"].isupper() else half
    other = path.with_name(f"{found['stem']}.{half}{found['compression'] or ''}")
    return [other] if other.exists() else []
