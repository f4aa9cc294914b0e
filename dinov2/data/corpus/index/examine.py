"""One unit of work to what the list says of it: rows of facts, or rows of problems. Runs in a process of its own.

A row is a plain dictionary, as the journal keeps it: `{"entry": datalist entry, "non_finite": share}` or
`{"path", "reason", "detail"}`. What the user's limits decide is not decided here, so that a change of them reads nothing again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import nibabel as nib
import numpy as np

from dinov2.data.corpus.index.metadata import describe_place, hashed_id, is_named_labels, read_sidecar
from dinov2.data.corpus.index.walk import Unit
from dinov2.data.datalist import Entry
from dinov2.data.preprocess import bounding_box, intensity_range, settle
from dinov2.data.volumes.bounded import describe_error, foreign
from dinov2.data.volumes.dicom import series_of, stack
from dinov2.data.volumes.opening import RawVolume, as_whole, open_image, open_volume, raw_volume
from dinov2.data.volumes.readers import ImageFile
from dinov2.errors import BadVolume, is_out_of_memory
from dinov2.geometry import Spacing

logger = logging.getLogger(__name__)

Row = dict[str, Any]

MAX_LABELS = 64  # a volume of at most so many different whole numbers is taken for a label map
PASSING = frozenset(  # reasons that may be over while the file stays as it is: looked at again by the next run
    ("memory", "missing", "permission", "reader_missing", "sidecar", "unreadable")
)
_SAMPLED = 4096
_SHA_CHARS = 32  # 128 bits


@dataclass(frozen=True)
class ExamineOptions:
    """What the user says about the files; a change of it has all files examined again.

    Attributes:
        pattern: Of the paths below each folder, None without.
        fourth_axis: What an unexplained fourth axis is: `time`, `channels` or `refuse`.
        spacing_mm: Of files whose format has none; None refuses them.
        keep_ids: Patient ids as they are.
        id_salt: Of the hashes that replace them.
    """

    pattern: re.Pattern[str] | None = None
    fourth_axis: str = "refuse"
    spacing_mm: Spacing | None = None
    keep_ids: bool = False
    id_salt: str = ""


def examine(options: ExamineOptions, units: tuple[Unit, ...]) -> list[tuple[Unit, list[Row]]]:
    """The rows of some units."""
    return [(unit, examine_unit(unit, options)) for unit in units]


def died(units: tuple[Unit, ...], how: str) -> list[tuple[Unit, list[Row]]]:
    """The rows of units whose process did not survive them."""
    return [(unit, [died_reading(unit.path, how)]) for unit in units]


def died_reading(path: str, how: str) -> Row:
    """The row of a file whose process did not survive it: a signal is for want of memory or a crash of a library."""
    logger.warning("%s: the process that read it %s: please report it, unless memory ran out", path, how)
    return problem(path, "unreadable", f"the process that read it {how}")


def problem(path: str, reason: str, detail: str) -> Row:
    """A row of the quarantine; the path is not said twice."""
    return {"path": path, "reason": reason, "detail": detail.removeprefix(f"{path}: ")}


def examine_unit(unit: Unit, options: ExamineOptions) -> list[Row]:
    """A row per volume: of a file, of each of its channels, or of each series of a folder.

    An error that is neither the system's nor a lack of memory is none that a file may cause: it ends the process, and `died`
    makes the row.
    """
    try:
        return _examine_unit(unit, options)
    except (OSError, MemoryError, RuntimeError) as err:
        lacks_memory = is_out_of_memory(err)
        if not (lacks_memory or isinstance(err, OSError)):
            raise
        return [problem(unit.path, "memory" if lacks_memory else "unreadable", f"cannot be examined: {describe_error(err)}")]


def _examine_unit(unit: Unit, options: ExamineOptions) -> list[Row]:
    if unit.problem:
        return [problem(unit.path, *unit.problem)]
    if not unit.slices:
        return _rows(unit.path, unit, options, partial(open_image, unit.path))
    rows = []
    series, bad = series_of(os.path.join(unit.path, name) for name in unit.slices)
    for path, err in bad:
        rows.append(problem(path, err.reason, str(err)))
    for uid, slices in series.items():
        rows += _rows(min(s.path for s in slices), unit, options, partial(stack, slices), str(uid))
    return sorted(rows, key=lambda row: row.get("path") or row["entry"]["image"])


def _rows(
    path: str, unit: Unit, options: ExamineOptions, open_it: Callable[[], ImageFile], series: str | None = None
) -> list[Row]:
    try:
        with foreign(path, "opened"):
            image = open_it()
        sidecar = read_sidecar(unit)
        spacing = sidecar.get("spacing") or (None if image.spacing else options.spacing_mm)
        entry: dict[str, Any] = {"image": path, "shape": _plain_shape(image.shape)}
        if spacing is not None:
            entry["spacing"] = list(spacing)
        place = describe_place(unit, path, image.tags or {}, options.pattern)
        if "patient" in place and not options.keep_ids:
            place["patient"] = hashed_id(place["patient"], options.id_salt)
        entry |= place | {k: v for k, v in (image.tags or {}).items() if k == "series"}
        channels = _channels(entry, image, sidecar.get("axes"), unit, options)
    except BadVolume as err:
        return [problem(path, err.reason, str(err))]
    rows = []
    for channel in channels:
        try:
            row = _row({**entry, **channel}, image, unit)
            rows.append({**row, "place": _place(series, image)} if series else row)
        except BadVolume as err:
            rows.append(problem(path, err.reason, str(err)))
    return rows


def _place(series: str, image: ImageFile) -> list[str]:
    """What tells the parts of one series: a hash of its UID, and where its first and last slice lie (0.1 mm)."""
    assert image.affine is not None  # of DICOM it is known
    ends = [image.affine @ (0, 0, k, 1) for k in (0, image.shape[2] - 1)]
    uid = hashlib.blake2b(series.encode(), digest_size=8).hexdigest()
    return [uid, " ".join(f"{x:.1f}" for x in np.concatenate([end[:3] for end in ends]) + 0.0)]


def _plain_shape(shape: tuple[int, ...]) -> list[int]:
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return list(shape)


def _channels(entry: Row, image: ImageFile, axes: str | None, unit: Unit, options: ExamineOptions) -> list[Row]:
    """What a fourth axis is, a dictionary per entry that the file becomes (paper, "Multi-channel inputs": one a channel)."""
    shape = entry["shape"]
    if len(shape) != 4:
        return [{}]
    names = unit.dataset.channels if len(unit.dataset.channels) == shape[3] else ()
    is_timed = len(image.spacing) > 3 and image.spacing[3] > 0 and not (names or unit.dataset.unread)
    unexplained = {"time": "xyzt", "channels": "xyzc"}.get(options.fourth_axis)
    if unit.dataset.unread and not (axes or image.is_channels or unexplained):
        what = f"a fourth axis of {shape[3]}, and {unit.dataset.unread}, which may say what it is, cannot be read: correct it"
        raise BadVolume(f"{entry['image']}: {what}, or --fourth-axis time or channels", "axes")
    axes = axes or ("xyzc" if image.is_channels or names else "xyzt" if is_timed else unexplained)
    if axes == "xyzt":
        return [{"axes": "xyzt"}]
    if axes == "xyzc":
        return [{"axes": "xyzc", "channel": c, **({"channel_name": names[c]} if names else {})} for c in range(shape[3])]
    what = f'a fourth axis of {shape[3]} that nothing explains: --fourth-axis time or channels, or "axes" in a sidecar'
    raise BadVolume(f"{entry['image']}: {what}", "axes")


def _row(entry: Row, image: ImageFile, unit: Unit) -> Row:
    spacing = entry.get("spacing")
    listed = Entry(entry["image"], tuple(entry["shape"]), spacing and tuple(spacing), entry.get("axes"), entry.get("channel"))
    raw = raw_volume(listed, image)
    entry["spacing"] = [round(float(s), 6) for s in raw.spacing_mm]
    if image.affine is not None:
        entry["orientation"] = orientation(image.affine)
    notes = dict.fromkeys((*image.notes, *raw.notes))
    if notes:
        entry["header_notes"] = list(notes)
    entry["dtype"] = str(image.dtype)
    facts, non_finite = describe_voxels(raw)
    entry |= facts
    if entry.pop("few_values") or is_named_labels(unit):
        entry["label_map"] = True
    is_folder = unit.dataset.is_folder and entry.get("dataset") == unit.dataset.name
    return {"entry": entry, "non_finite": non_finite, **({"is_folder": True} if is_folder else {})}


def orientation(affine: np.ndarray) -> str:
    """Towards what each voxel axis runs, as RAS; of an oblique volume the closest."""
    axes = np.argmax(np.abs(affine[:3, :3]), axis=0)
    if len(set(axes.tolist())) < 3:  # far from any axes: settled by a decomposition, which takes longer
        return "".join(code or "?" for code in nib.aff2axcodes(affine))
    return "".join("LPI"[a] if affine[a, i] < 0 else "RAS"[a] for i, a in enumerate(axes))


def describe_voxels(raw: RawVolume) -> tuple[Row, float]:
    """Percentiles and foreground box (of the first time point, stored axes), content hash; share of non-finite voxels.

    Raises:
        BadVolume: Damaged, constant, or without a finite voxel.
    """
    digest, flips, bad, facts = hashlib.sha256(), None, 0, {}
    for time in range(raw.num_times):
        voxels = raw.read(time)
        bad += voxels.size - int(np.isfinite(voxels).sum())
        if flips is None:
            flips = canonical_flips(voxels)
        _add_voxels(digest, voxels[flips])
        if time == 0:
            voxels, padding = settle(voxels, raw.path, raw.padding(voxels))
            low, high = intensity_range(voxels, raw.path, padding=padding)
            box = bounding_box(voxels > low)
            facts = {
                "percentiles": [float(f"{low:.6g}"), float(f"{high:.6g}")],
                "foreground": [[b.start, b.stop] for b in box],
                "few_values": has_few_values(voxels, raw.image.step),
                **({} if padding is None else {"padding": float(f"{padding.mean():.4g}")}),
            }
    return {**facts, "sha": digest.hexdigest()[:_SHA_CHARS]}, bad / (raw.num_times * voxels.size)


def content_sha(entry: Entry) -> str:
    """Hash of the voxels of an entry: the same for every format, compression and header, and for a flipped axis.

    Raises:
        BadVolume: The file cannot be used.
    """
    return describe_voxels(open_volume(entry))[0]["sha"]


def canonical_flips(voxels: np.ndarray) -> tuple[slice, ...]:
    """Turn each axis so that its first half weighs more: readers of one scan differ in the direction of axes.

    The sums are in float64, so that whole numbers are exact; halves that weigh the same leave the axis as it is.
    """
    weights = np.nan_to_num(voxels.sum(axis=2, dtype=np.float64), posinf=0, neginf=0)
    along_z = np.nan_to_num(voxels.sum(axis=(0, 1), dtype=np.float64), posinf=0, neginf=0)
    flips = []
    for profile in (weights.sum(axis=1), weights.sum(axis=0), along_z):
        half = len(profile) // 2
        first, last = profile[:half].sum(), profile[len(profile) - half :].sum()
        is_lighter = last - first > 1e-9 * (abs(first) + abs(last))
        flips.append(slice(None, None, -1) if is_lighter else slice(None))
    return tuple(flips)


def _add_voxels(digest: Any, voxels: np.ndarray) -> None:
    """Shape and values (float32, x fastest, -0 as 0), slice by slice so that no copy of the whole is made."""
    digest.update(np.array(voxels.shape, "<i8").tobytes())
    for k in range(voxels.shape[2]):
        digest.update(np.ascontiguousarray(voxels[:, :, k].T + np.float32(0), "<f4").data)


def has_few_values(voxels: np.ndarray, step: float = 0.0) -> bool:
    """Whether it looks like a label map: at most `MAX_LABELS` different values, all of them whole numbers from 0.

    Args:
        voxels: Any shape.
        step: `ImageFile.step`, by which storing may have moved them.
    """
    flat = voxels.ravel("K")
    for values in (flat[:: max(1, voxels.size // _SAMPLED) | 1], flat):  # an odd step, not to run along one plane
        found = np.unique(values)
        if len(found) > MAX_LABELS:
            return False
        whole = as_whole(found, step)
        if whole[0] < 0 or not (whole == np.rint(whole)).all():
            return False
    return True
