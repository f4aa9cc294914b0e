"""What a search found, as a page that opens offline and as CSV beside it."""

from __future__ import annotations

import csv
import html
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datalist import Entry
from dinov2.data.preprocess import foreground_box, normalise
from dinov2.data.volumes.opening import open_volume
from dinov2.errors import BadVolume
from dinov2.files import write_text
from dinov2.geometry import Range
from dinov2.visual.page import page, picture
from dinov2.visual.planes import three_planes

logger = logging.getLogger(__name__)

CSV_COLUMNS = ("rank", "row", "id", "path", "channel", "distance", "x", "y", "z")
_SHOWN_FACTS = ("patient", "modality", "organ", "series")
_SIDES = "Sagittal, coronal and axial plane; the patient's left is on the left."


@dataclass(frozen=True)
class Found:
    """A scan on the page: the query, or a hit.

    Attributes:
        name: What it is called.
        entry: Its file.
        row: Of the table; None: none of it.
        distance: From the query; None: it is the query.
        place_mm: [3] in its own world; None: the whole scan was compared.
        facts: What else is known of it.
    """

    name: str
    entry: Entry
    row: int | None = None
    distance: float | None = None
    place_mm: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def write_csv(hits: Sequence[Found], path: Path) -> None:
    """A line a hit, nearest first; x, y, z are mm of the hit's own world, empty where whole scans were compared."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for rank, hit in enumerate(hits, 1):
        place = [""] * 3 if hit.place_mm is None else [f"{x:.2f}" for x in hit.place_mm]
        channel = "" if hit.entry.channel is None else hit.entry.channel
        writer.writerow([rank, hit.row, hit.name, hit.entry.image, channel, f"{hit.distance:.6f}", *place])
    write_text(path, text.getvalue())


def write_page(query: Found, hits: Sequence[Found], notes: Sequence[str], percentiles: Range, path: Path) -> None:
    """The page.

    Args:
        query, hits: What is shown, in this order.
        notes: Lines of plain text at the end: what was searched, and how.
        percentiles: Of intensities, that are black and white.
        path: HTML.
    """
    is_of_places = query.place_mm is not None
    title = "The same place in other scans" if is_of_places else "The most similar scans"
    sections = [(f"Query: {html.escape(query.name)}", _shown(query, percentiles))]
    sections += [(f"{rank}. {html.escape(hit.name)}", _shown(hit, percentiles)) for rank, hit in enumerate(hits, 1)]
    sections.append(("How", "".join(f"<p>{html.escape(line)}</p>" for line in (*notes, _SIDES))))
    write_text(path, page(title, [], sections))


def place_in_words(place_mm: np.ndarray) -> str:
    """x, y, z as a user would give them to `--at`."""
    return " ".join(f"{x:.1f}" for x in place_mm)


def _shown(found: Found, percentiles: Range) -> str:
    """Pictures of a scan and what is known of it; one whose file is gone is named all the same."""
    lines = [] if found.distance is None else [f"<b>distance {found.distance:.4f}</b>"]
    if found.place_mm is not None:
        lines.append(f"at {place_in_words(found.place_mm)} mm")
    facts = [f"{name} {found.facts[name]}" for name in _SHOWN_FACTS if found.facts.get(name) is not None]
    lines += [html.escape(text) for text in facts]
    lines += [] if found.row is None else [f"row&nbsp;{found.row}"]
    caption = f"{' · '.join(lines)}<br>{html.escape(found.entry.image)}"
    try:
        return picture(_planes(found, percentiles), caption)
    except BadVolume as err:
        logger.warning("picture missing: %s", err)
        return f"<p>picture missing: {html.escape(str(err))}</p><p>{caption}</p>"


def _planes(found: Found, percentiles: Range) -> np.ndarray:
    """[rows, columns, 3]: through the place, or the middle of what is no background.

    Raises:
        BadVolume: The scan cannot be read.
    """
    raw = open_volume(found.entry)
    voxels = raw.read()
    voxels = normalise(voxels, raw.path, percentiles, raw.padding(voxels))
    if found.place_mm is not None:
        return three_planes((voxels + 1) / 2, raw.affine, found.place_mm, is_marked=True)
    middle = np.array([(b.start + b.stop - 1) / 2 for b in foreground_box(voxels)])
    return three_planes((voxels + 1) / 2, raw.affine, raw.affine[:3, :3] @ middle + raw.affine[:3, 3])
