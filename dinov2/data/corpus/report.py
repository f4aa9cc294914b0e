"""One HTML page about a datalist and its quarantine: counts, histograms, mid-slices, what was set aside. Opens offline.

No path, file name or patient id is on the page, whatever the list has; data sets are named, but for those whose only name
is that of one folder of several (`dinov2 index SCANS/*`). Figures are inline SVG, mid-slices inline PNG.
"""

from __future__ import annotations

import html
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datalist import Entry, read_datalist
from dinov2.data.preprocess import slice_axis
from dinov2.data.volumes.opening import mid_slice
from dinov2.errors import BadInput, BadVolume
from dinov2.files import read_json, write_text
from dinov2.visual.page import histogram, page, picture, stacked_bars, table

logger = logging.getLogger(__name__)

NUM_PICTURES = 48
PICTURE_PIXELS = 150
_UNKNOWN = "not known"
_LABEL_MAP = "label maps"
_COLOURS = ("#3b6fb6", "#d98032", "#4f9d69", "#a457a8", "#b5484d", "#2f8f9d")
_GREYS = {_UNKNOWN: "#8d96a0", _LABEL_MAP: "#c3c9d0"}
_MEANINGS = {
    "unreadable": "not an image, or damaged",
    "truncated": "shorter than its header says",
    "memory": "there was no memory to read it",
    "damaged": "its checksum does not match, or it expands to more than its header needs",
    "not_a_file": "a pipe, a socket or a device",
    "non_finite": "NaN or infinite voxels",
    "constant": "all voxels are (nearly) the same",
    "small_axis": "too few voxels along an axis",
    "spacing": "no spacing, or one that cannot be",
    "geometry": "where its voxels lie cannot be told from its header",
    "duplicate": "the same voxels as another volume",
    "axes": "a fourth axis that nothing explains, or none",
    "missing_slices": "slices are missing in a DICOM series, or unevenly spaced",
    "mixed_slices": "slices of several kinds in a DICOM series",
    "not_an_image": "a file of such a format without a volume",
    "not_real_numbers": "colour or complex",
    "permission": "may not be read",
    "symlink_loop": "a link back to a folder above it",
    "missing": "a link to nothing",
    "sidecar": "the JSON file beside it cannot be used",
    "name": "a name that is not in UTF-8",
    "unsupported": "a variant that is not read",
    "reader_missing": "the library that reads it is not installed",
}


def write_report(list_path: Path, quarantine_path: Path, output: Path) -> None:
    """Write the page.

    Args:
        list_path: From `dinov2 index` or `curate`; it may be empty.
        quarantine_path: From `dinov2 index`.
        output: The HTML file.

    Raises:
        BadInput: A list cannot be read, or the page cannot be written.
    """
    items = _read(list_path)
    entries = _without_folders(read_datalist(list_path).entries if items else [])
    try:
        write_text(output, _page(entries, _read(quarantine_path)))
    except OSError as err:
        raise BadInput(f"--report {output}: {err.strerror}: choose another file") from err


def _read(path: Path) -> list[dict[str, Any]]:
    return read_json(path, advice="run `dinov2 index` first")


def _page(entries: list[Entry], quarantine: list[dict[str, Any]]) -> str:
    patients = {(e.extra.get("dataset"), e.extra["patient"]) for e in entries if "patient" in e.extra}
    datasets = Counter(str(e.extra.get("dataset", _UNKNOWN)) for e in entries)
    numbers = [
        (f"{len(entries):,}", "volumes"),
        (f"{len(datasets):,}", "data sets"),
        (f"{len(patients):,}" if patients else "—", "patients known"),
        (f"{_voxels(entries) / 1e9:.3g}", "billion voxels"),
        (f"{len(quarantine):,}", "set aside"),
    ]
    sections = [
        ("Modalities and organs", _stacked_bars(entries)),
        ("Data sets", table(("data set", "volumes"), [(name, f"{n:,}") for name, n in datasets.most_common()])),
        ("Size and spacing", _histograms(entries)),
        ("Mid-slices", _contact_sheet(entries)),
        ("Set aside", _quarantine(quarantine)),
    ]
    return page("Corpus report", numbers, sections)


def _without_folders(entries: list[Entry]) -> list[Entry]:
    """Data sets that are named by one folder of several, which may be a patient's, get numbers for names."""
    named = [e.extra["dataset"] for e in entries if e.extra.get("dataset_is_folder")]
    number = {name: f"folder {i}" for i, name in enumerate(dict.fromkeys(named), 1)}
    return [
        replace(e, extra={**e.extra, "dataset": number[e.extra["dataset"]]}) if e.extra.get("dataset_is_folder") else e
        for e in entries
    ]


def _voxels(entries: list[Entry]) -> int:
    return sum(math.prod(e.shape[:3]) for e in entries)


def _modality(entry: Entry) -> str:
    return _LABEL_MAP if entry.extra.get("label_map") else str(entry.extra.get("modality", _UNKNOWN))


def organ_counts(entries: Sequence[Entry]) -> dict[str, Counter[str]]:
    """Volumes by organ, then modality."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        counts[str(entry.extra.get("organ", _UNKNOWN))][_modality(entry)] += 1
    return counts


def draw_list(list_path: Path, output: Path) -> int:
    """Bars of a list's organs and modalities (the paper's Fig. 1b): `corpus` as PNG, PDF and CSV, in a folder; the volumes.

    Raises:
        BadInput: The list cannot be read, or the folder not written.
    """
    from dinov2.visual.figures.drawings import draw_corpus  # here: a page needs no matplotlib

    entries = read_datalist(list_path).entries
    try:
        draw_corpus(organ_counts(entries), output / "corpus")
    except OSError as err:
        raise BadInput(f"--output {output}: {err.strerror}: choose another folder") from err
    return len(entries)


def _stacked_bars(entries: list[Entry]) -> str:
    """Counts by organ, in colours by modality (the paper's Fig. 1b)."""
    counts = organ_counts(entries)
    named = [name for name, _ in Counter(map(_modality, entries)).most_common() if name not in _GREYS]
    modalities = [*named, *_GREYS]
    colour = _GREYS | {name: _COLOURS[min(i, len(_COLOURS) - 1)] for i, name in enumerate(named)}
    return stacked_bars(counts, {name: colour[name] for name in modalities})


def _histograms(entries: list[Entry]) -> str:
    known = [(e.shape[:3], e.spacing_mm) for e in entries if e.spacing_mm]
    across = [slice_axis(spacing) for _, spacing in known]
    in_plane = [max(n for i, n in enumerate(shape) if i != axis) for (shape, _), axis in zip(known, across, strict=True)]
    spacing = [min(s for i, s in enumerate(mm) if i != axis) for (_, mm), axis in zip(known, across, strict=True)]
    figures: list[tuple[str, Sequence[float], str]] = [
        ("voxels in plane (longer side)", in_plane, ""),
        ("slices", [shape[axis] for (shape, _), axis in zip(known, across, strict=True)], ""),
        ("voxels along the smallest axis", [min(shape) for shape, _ in known], ""),
        ("spacing in plane", spacing, " mm"),
        ("distance of slices", [mm[axis] for (_, mm), axis in zip(known, across, strict=True)], " mm"),
        ("longest extent", [max(n * s for n, s in zip(shape, mm, strict=True)) for shape, mm in known], " mm"),
    ]
    return f'<div class="figures">{"".join(histogram(*figure) for figure in figures)}</div>'


def _contact_sheet(entries: list[Entry]) -> str:
    """Mid-slices of volumes from all over the list; one that cannot be read any more is left out and said in the log."""
    pictures = []
    for entry in _spread(entries):
        try:
            plane = mid_slice(entry, PICTURE_PIXELS)
        except BadVolume as err:
            logger.warning("no picture: %s", err)
            continue
        shape = " x ".join(str(n) for n in entry.shape)
        words = f"{_modality(entry)}, {entry.extra.get('organ', _UNKNOWN)}"
        caption = f"{html.escape(words)}<br>{html.escape(str(entry.extra.get('dataset', '')))}<br>{shape}"
        pictures.append(picture(plane, caption))
    return f'<div class="sheet">{"".join(pictures)}</div>'


def _spread(entries: list[Entry]) -> list[Entry]:
    """At most `NUM_PICTURES`, from every data set and modality in turn, evenly over each."""
    groups: dict[tuple[Any, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.extra.get("dataset"), _modality(entry)].append(entry)
    per_group = math.ceil(NUM_PICTURES / max(1, len(groups)))
    places = {key: np.unique(np.linspace(0, len(group) - 1, per_group).round().astype(int)) for key, group in groups.items()}
    turns = [(turn, key, place) for key, found in places.items() for turn, place in enumerate(found)]
    chosen = sorted(turns, key=lambda t: t[0])[:NUM_PICTURES]
    return [groups[key][place] for _, key, place in sorted(chosen, key=lambda t: (str(t[1]), t[2]))]


def _quarantine(rows: list[dict[str, Any]]) -> str:
    """Counts by reason, and where to find each in the quarantine file: its number there, not its path."""
    if not rows:
        return "<p>Nothing: every file could be used.</p>"
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows, 1):
        numbers[row["reason"]].append(number)
    rows_shown = []
    for reason, found in sorted(numbers.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(map(str, found[:12])) + (", ..." if len(found) > 12 else "")
        rows_shown.append((reason, _MEANINGS.get(reason, ""), f"{len(found):,}", shown))
    note = "<p>The last column counts the entries of the quarantine file, which has path and detail of each.</p>"
    return table(("reason", "meaning", "files", "entries"), rows_shown) + note
