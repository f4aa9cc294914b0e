"""What headers say of where voxels lie, to one affine in mm; spacing is the length of its columns, and nothing else's.

What cannot be told is refused by name; what a header says otherwise beside a good affine is a note, which opening says once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dinov2.errors import BadVolume
from dinov2.geometry import Spacing, triple

SAME = 1e-3  # relative difference up to which two spacings are one, and a direction counts as of length 1
_FLAT = 1e-3  # volume of the columns' directions, below which they do not span space
_ENDLESS = 1e100  # mm, beyond which distances cannot be reckoned with; so much as infinite
_UNITS_MM = {
    "nm": 1e-6, "um": 1e-3, "\N{MICRO SIGN}m": 1e-3, "\N{GREEK SMALL LETTER MU}m": 1e-3, "micron": 1e-3, "mm": 1.0, "cm": 10.0,
    "dm": 100.0, "m": 1000.0, "in": 25.4, "inch": 25.4,
} | {
    prefix + name: mm
    for prefix, mm in (("nano", 1e-6), ("micro", 1e-3), ("milli", 1.0), ("centi", 10.0), ("deci", 100.0), ("", 1000.0))
    for name in ("meter", "metre")
}  # fmt: skip


def column_spacing(affine: np.ndarray) -> Spacing:
    """mm along the three voxel axes of a [4, 4]."""
    return triple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))


def check_affine(path: str, affine: np.ndarray) -> None:
    """An affine that says of every voxel where it lies, and of no two the same.

    Raises:
        BadVolume: It is not finite, or flat.
    """
    if not (np.abs(affine) < _ENDLESS).all():  # nan too
        raise BadVolume(f"{path}: its affine is not finite, so its voxels have no place: correct the header", "geometry")
    spacing = column_spacing(affine)
    check_positive(path, spacing)
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < _FLAT:
        raise BadVolume(f"{path}: its affine is singular, two of its axes run the same way: correct the header", "geometry")


def check_positive(path: str, spacing: Iterable[float]) -> None:
    """Three distances that can be.

    Raises:
        BadVolume: One is zero, negative, or not finite.
    """
    shown = tuple(float(s) for s in spacing)
    if not all(np.isfinite(s) and s > 0 for s in shown):
        raise BadVolume(f"{path}: spacing {shown} is not positive: correct the header", "spacing")


def differs(one: Iterable[float], other: Iterable[float]) -> bool:
    """Whether two spacings are not one; what is not finite differs from everything."""
    return not np.allclose(tuple(one), tuple(other), rtol=SAME, atol=0)


def shown_mm(spacing: Iterable[float]) -> str:
    return " x ".join(f"{s:.6g}" for s in spacing) + " mm"


def unit_mm(path: str, names: Iterable[str]) -> float:
    """How many mm the one unit of some axes has.

    Raises:
        BadVolume: They are several, or none that is known.
    """
    found = {name.strip().lower() for name in names}
    known = {_UNITS_MM.get(name) or _UNITS_MM.get(name.removesuffix("s")) for name in found}
    if len(known) != 1 or None in known:
        what = f"its axes are in {', '.join(sorted(found))}: write its header in mm"
        raise BadVolume(f"{path}: {what}", "geometry")
    return known.pop() or 1.0


def of_text_header(path: str, text: str) -> tuple[float, tuple[str, ...]]:
    """What a NRRD's or MetaImage's header says and ITK leaves aside: mm of its unit, and notes.

    Raises:
        BadVolume: A unit that is not known, a spacing that cannot be (ITK takes 1 for it).
    """
    is_nrrd = text.startswith("NRRD")

    def field(*names: str) -> str | None:
        found = re.search(rf"(?im)^(?:{'|'.join(names)})[ \t]*{':' if is_nrrd else '='}[ \t]*(.*?)[ \t]*\r?$", text)
        return found[1] if found else None

    if is_nrrd:
        units = [u for u in re.findall(r'"([^"]*)"', field("space ?units") or "") if u.strip()]
        units = units or [u for u in re.findall(r'"([^"]*)"', field("units") or "") if _is_length(u)]
        spacing, has_spacing = field("spacings"), field("spacings", "space ?directions") is not None
    else:
        units = [u for u in [field("DistanceUnits") or ""] if u not in ("", "?")]
        spacing = field("ElementSpacing") or field("ElementSize")
        has_spacing = spacing is not None
    mm = unit_mm(path, units) if units else 1.0
    if spacing is not None:
        _check_numbers(path, spacing)
    return mm, () if has_spacing else ("its header has no spacing: 1 mm is taken",)


def _is_length(unit: str) -> bool:
    name = unit.strip().lower()
    return name in _UNITS_MM or name.removesuffix("s") in _UNITS_MM


def _check_numbers(path: str, words: str) -> None:
    """Three of the numbers can be spacings; an axis of channels or time may have none (nan)."""
    try:
        numbers = [float(w) for w in words.split()]
    except ValueError as err:
        raise BadVolume(f"{path}: spacing {words} is no row of numbers: correct the header", "spacing") from err
    if len(numbers) > 3:
        numbers = [n for n in numbers if not np.isnan(n)][:3] or numbers
    if len(numbers) >= 3:
        check_positive(path, numbers[:3])


def header_text(path: str | Path, num_bytes: int) -> str:
    """The beginning of a text header's file."""
    with open(path, "rb") as file:
        block = file.read(num_bytes)
    block = re.split(rb"\r?\n\r?\n|ElementDataFile[^\n]*\n", block, maxsplit=1)[0]
    try:
        return block.decode()
    except UnicodeDecodeError:
        return block.decode("latin-1")
