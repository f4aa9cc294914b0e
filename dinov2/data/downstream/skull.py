"""Whether a head scan still has its skull: a stripped brain lies in exact background, a head reaches the edge of the scan."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from dinov2.data.datalist import Entry
from dinov2.data.downstream.lists import Item
from dinov2.data.downstream.recipes import Recipe
from dinov2.data.volumes.opening import open_volume

logger = logging.getLogger(__name__)

LOOKED_AT = 3  # scans
EMPTY = 0.99  # share of the outermost voxels that have one value around a stripped brain


def looks_stripped(voxels: np.ndarray) -> bool:
    """Whether (nearly) all outermost voxels of [X, Y, Z] have one value: air is noisy, and a neck leaves the scan."""
    faces = [np.take(voxels, (0, -1), axis).ravel() for axis in range(3)]
    outermost = np.concatenate(faces)
    return bool((outermost == np.median(outermost)).mean() >= EMPTY)


def warn_of_skulls(items: Sequence[Item], recipe: Recipe) -> None:
    """Look at the first scans, where the recipe says that skulls are removed, and warn where one looks otherwise.

    Raises:
        BadVolume: A scan cannot be read.
    """
    if not recipe.skull_stripped:
        return
    for item in items[:LOOKED_AT]:
        if not looks_stripped(open_volume(Entry(item.images[0], (), axes="xyzc")).read()):
            what = "%s: does not look skull-stripped, as %s's scans must be: strip all scans in the same way"
            logger.warning(what, item.images[0], recipe.name)
            return
