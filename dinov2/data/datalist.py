"""Datalists: which volumes to train on, with their shape and spacing, checked when read."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov2.errors import BadInput
from dinov2.files import is_number, path_for_list, path_in_list, read_json, replacing, to_json, user_path
from dinov2.geometry import Spacing, triple

logger = logging.getLogger(__name__)

FOURTH_AXES = ("xyzt", "xyzc")
_KNOWN = ("image", "shape", "spacing", "axes", "channel")


@dataclass(frozen=True)
class Entry:
    """One volume of a datalist.

    Attributes:
        image: Absolute path; of a DICOM series one of its files, or its folder.
        shape: [x, y, z] or [x, y, z, t] in voxels, as stored.
        spacing_mm: (sx, sy, sz) of a format without one; of another the file's counts, and a difference is said.
        axes: What a fourth axis is: `xyzt` time, `xyzc` channels; None: time where the header gives it a spacing.
        channel: Which channel of an `xyzc` volume.
        orientation: Where the axes of what is read shall point (`RAS`); no key of a list. None: as stored.
        extra: Other keys of the list (modality, organ, dataset, patient, ...).
    """

    image: str
    shape: tuple[int, ...]
    spacing_mm: Spacing | None = None
    axes: str | None = None
    channel: int | None = None
    orientation: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    def as_item(self) -> dict[str, Any]:
        """The object that a list has for it."""
        spacing = None if self.spacing_mm is None else list(self.spacing_mm)
        known = {"image": self.image, "shape": list(self.shape), "spacing": spacing, "axes": self.axes, "channel": self.channel}
        return {**{k: v for k, v in known.items() if v is not None}, **self.extra}


@dataclass(frozen=True)
class Datalist:
    """Entries in list order and the hash of the list they came from (before any filter)."""

    entries: list[Entry]
    sha256: str
    path: str

    def __len__(self) -> int:
        return len(self.entries)

    def larger_than(self, min_axis: int) -> Datalist:
        """The entries whose smallest spatial axis is greater than `min_axis` voxels.

        Raises:
            BadInput: None is.
        """
        kept = [e for e in self.entries if min(e.shape[:3]) > min_axis]
        if not kept:
            raise BadInput(
                f"{self.path}: none of its {len(self)} volumes has more than train.data_min_axis_size={min_axis} voxels "
                "along its smallest axis: lower that key or use larger volumes"
            )
        if len(kept) < len(self):
            logger.info("%d of %d volumes have more than %d voxels along every axis", len(kept), len(self), min_axis)
        return Datalist(kept, self.sha256, self.path)


def read_datalist(path: str | Path) -> Datalist:
    """Read and check a pretraining datalist (JSON list of objects); relative paths resolve against its folder.

    Whether the volumes themselves are usable shows when they are loaded.

    Raises:
        BadInput: Missing, not JSON, not a list, empty, or an entry of the wrong form, by number.
    """
    path = Path(user_path(path))
    items = read_json(path, f"datalist {path}", "set train.dataset_path to a JSON list of volumes")
    if not isinstance(items, list):
        raise BadInput(f"datalist {path} holds a {type(items).__name__}, expected a list of {{image, shape, spacing}}")
    if not items:
        raise BadInput(f"datalist {path} is empty")
    entries = [_entry(item, path, i) for i, item in enumerate(items)]
    return Datalist(entries, hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest(), str(path))


def _entry(item: Any, path: Path, i: int) -> Entry:
    where = f"datalist {path}, entry {i}"
    if not isinstance(item, dict) or not isinstance(item.get("image"), str) or not item["image"]:
        raise BadInput(f'{where}: expected an object with "image": path, got {json.dumps(item)[:80]}')
    where = f"{where} ({item['image']})"
    shape, spacing = item.get("shape"), item.get("spacing")
    if not (isinstance(shape, list) and len(shape) in (3, 4) and all(type(s) is int and s > 0 for s in shape)):
        raise BadInput(f"{where}: shape must be three or four positive integers, got {json.dumps(shape)}")
    ok = isinstance(spacing, list) and len(spacing) >= 3 and all(is_number(s) for s in spacing[:3])
    if spacing is not None and not ok:
        raise BadInput(f"{where}: spacing must be three numbers (mm), got {json.dumps(spacing)}")
    axes, channel = item.get("axes"), item.get("channel")
    if axes not in (None, *FOURTH_AXES):
        raise BadInput(f'{where}: axes must be "xyzt" or "xyzc", got {json.dumps(axes)}')
    if channel is not None and not (type(channel) is int and channel >= 0):
        raise BadInput(f"{where}: channel must be a whole number from 0, got {json.dumps(channel)}")
    return Entry(
        image=path_in_list(item["image"], path.parent),
        shape=tuple(shape),
        spacing_mm=None if spacing is None else triple(float(s) for s in spacing[:3]),
        axes=axes,
        channel=channel,
        extra={k: v for k, v in item.items() if k not in _KNOWN},
    )


def write_datalist(path: str | Path, items: Iterable[dict[str, Any]]) -> int:
    """Write a datalist atomically; `image` paths become relative to its folder where they can (`path_for_list`).

    Returns:
        The number of entries.
    """
    path = Path(path)
    count = 0
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):  # item by item: a list may be longer than memory allows
        for item in items:  # one by one: a list may be longer than memory allows
            row = {**item, "image": path_for_list(item["image"], path.parent)}
            file.write(("[\n" if count == 0 else ",\n") + to_json(row))
            count += 1
        file.write("\n]\n" if count else "[]\n")
    return count
