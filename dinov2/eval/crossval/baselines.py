"""What features have to beat: numbers that anybody can take from a scan, and columns of the table of people."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dinov2.data.datalist import Entry
from dinov2.data.preprocess import normalise
from dinov2.data.volumes.opening import open_volume
from dinov2.errors import BadVolume
from dinov2.eval.crossval.tables import People
from dinov2.logging.progress import track

BINS = 16  # of the histogram, over [-1, 1]


def volume_and_histogram(scans: Sequence[str]) -> tuple[np.ndarray, str | None]:
    """Of each scan the volume (ml) above its background, and the shares of its intensities, mapped to [-1, 1], in equal bins.

    The background is the lower percentile of pretraining's mapping: of a skull-stripped brain all outside of it.

    Returns:
        [n, 1 + BINS], and why there is none: the first scan that cannot be read.
    """
    rows = []
    for path in track(scans, "scans for volume and histogram"):
        try:
            raw = open_volume(Entry(path, ()))
            voxels = raw.read()
            values = normalise(voxels, path, padding=raw.padding(voxels))
        except BadVolume as err:
            return np.empty((0, 1 + BINS)), str(err)
        inside = values[values > -1]
        shares = np.histogram(inside, BINS, (-1, 1))[0] / max(1, len(inside))
        rows.append([len(inside) * float(np.prod(raw.spacing_mm)) / 1000, *shares])
    return np.array(rows), None


def covariate_columns(people: People, lines: Sequence[int], column: str) -> np.ndarray:
    """A column of the table: its numbers [n, 1], or for words one column of 0 and 1 each.

    Raises:
        BadInput: A cell has no value.
    """
    cells = [people.value(line, column) for line in lines]
    numbers = [people.number(cell) for cell in cells]
    if all(number is not None for number in numbers):
        return np.array(numbers, float)[:, None]
    return (np.array(cells)[:, None] == np.array(sorted(set(cells)))).astype(float)
