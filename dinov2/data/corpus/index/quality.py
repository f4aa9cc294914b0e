"""Which rows are listed and which are set aside, and why. Nothing is deleted; a change of limits reads no file again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dinov2.data.corpus.index.examine import Row, problem

SPACING_MM = (0.01, 50.0)  # of a scan of people or animals; outside, a header is wrong
MAX_EXTENT_MM = 3000.0


@dataclass(frozen=True)
class Limits:
    """What the user accepts.

    Attributes:
        min_axis: Voxels along the smallest spatial axis.
        max_non_finite: Share of voxels that may be NaN or infinite (they become the mean of the others when trained on).
    """

    min_axis: int = 8
    max_non_finite: float = 0.0


def parted_series(rows: Iterable[Row]) -> dict[str, list[str]]:
    """The folders of each DICOM series whose slices lie in several, by its mark.

    Copies of a series, and its time points or phases in a folder each, lie at the same places.
    """
    places: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        if "place" in row:
            series, place = row["place"]
            places.setdefault(series, {}).setdefault(os.path.dirname(row["entry"]["image"]), set()).add(place)
    return {
        series: sorted(folders)
        for series, folders in places.items()
        if len(folders) > 1 and len({frozenset(found) for found in folders.values()}) > 1
    }


def judge(rows: Iterable[Row], limits: Limits, parted: Mapping[str, list[str]]) -> Iterator[tuple[bool, dict[str, Any]]]:
    """(True, a datalist entry) or (False, a row of the quarantine) for each row, in order.

    Of volumes with the same content the first stays; rows come in order of their paths.

    Args:
        rows: Of the journal.
        limits: The user's.
        parted: As of `parted_series`.
    """
    kept: dict[str, str] = {}
    for row in rows:
        if "entry" not in row:
            yield False, row
            continue
        entry = row["entry"]
        found = _parted(row, parted) or _fault(row, limits)
        if found is None and entry["sha"] in kept:
            found = ("duplicate", f"the same voxels as {kept[entry['sha']]}")
        if found is None:
            kept[entry["sha"]] = entry["image"]
            yield True, entry
        else:
            yield False, problem(entry["image"], *found)


def _parted(row: Row, parted: Mapping[str, list[str]]) -> tuple[str, str] | None:
    folders = parted.get(row.get("place", [""])[0])
    if folders is None:
        return None
    own = os.path.dirname(row["entry"]["image"])
    others = ", ".join(folder for folder in folders if folder != own)
    return "missing_slices", f"other slices of its series lie in {others}: put them into one folder"


def _fault(row: Row, limits: Limits) -> tuple[str, str] | None:
    entry, share = row["entry"], row["non_finite"]
    shape, spacing = entry["shape"][:3], entry["spacing"]
    if share > limits.max_non_finite:
        return "non_finite", f"{share:.2%} of its voxels are NaN or infinite (--max-nan allows {limits.max_non_finite:.2%})"
    if min(shape) < limits.min_axis:
        return "small_axis", f"{'x'.join(map(str, shape))} voxels, fewer than --min-axis {limits.min_axis} along one axis"
    if not all(SPACING_MM[0] <= s <= SPACING_MM[1] for s in spacing):
        return "spacing", f"spacing of {spacing} mm, expected between {SPACING_MM[0]} and {SPACING_MM[1]}"
    extent_mm = max(n * s for n, s in zip(shape, spacing, strict=True))
    if extent_mm > MAX_EXTENT_MM:
        return "spacing", f"{extent_mm:.0f} mm long by its spacing of {spacing} mm, more than {MAX_EXTENT_MM:.0f}"
    return None
