"""The same place in two people: places of one head looked for in the other by patch tokens, and by voxels.

The place that corresponds is the one with the same share of the head's box along each axis: some millimetres off, for all
alike.

Shapes: N places, s edge of a crop of voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dinov2.eval.measures.region_retrieval import Places, places_of
from dinov2.features.encoder import Encoder
from dinov2.features.retrieval.places import TokenGrid, best_place, window_around
from dinov2.features.scans import Scan
from dinov2.features.views import View

SCANS = tuple(Path(__file__).with_name("scans") / f"sub-{number}_T1w_2mm.nii.gz" for number in ("06", "13"))
REGION_VOX = 16  # s: 32 mm; tokens are compared over as much
ASK_VOX, SEARCH_VOX = 8, 4  # between places that ask, and between crops of voxels that answer
FAR_MM = 20.0  # beyond it another part of the head was found


@dataclass(frozen=True)
class Asked:
    """Places of one head that are looked for in another.

    Attributes:
        one, other: The heads.
        crops: Crops of the one, of which the middles of `rows` ask.
        rows: [N].
    """

    one: Scan
    other: Scan
    crops: Places
    rows: np.ndarray

    @property
    def places_mm(self) -> np.ndarray:
        """[N, 3]."""
        return in_world(self.one, centres_vox(self.crops, self.one)[self.rows])

    @property
    def wanted_mm(self) -> np.ndarray:
        """[N, 3]: where they should be in the other."""
        share = (centres_vox(self.crops, self.one)[self.rows] + 0.5) / self.one.voxels.shape[1:]
        return in_world(self.other, share * self.other.voxels.shape[1:] - 0.5)


Finder = Callable[[Asked], np.ndarray]  # where they are in the other, [N, 3] in mm


def ask(one: Scan, other: Scan, rng: np.random.Generator, count: int) -> Asked:
    """Random places well inside one head."""
    crops = places_of(one, REGION_VOX, ASK_VOX)
    return Asked(one, other, crops, rng.permutation(len(crops.windows))[:count])


def errors_mm(asked: Asked, found_mm: np.ndarray) -> np.ndarray:
    """[N] distances of what was found from where it should be."""
    return np.linalg.norm(found_mm - asked.wanted_mm, axis=1)


def by_tokens(encoder: Encoder, scans: Sequence[Scan]) -> Finder:
    """As `dinov2 retrieve --at`: by a window of patch tokens; each scan is encoded once."""
    view, grids = View("sliding_window"), {}
    for scan in scans:
        seen = encoder.encode_scan(scan, view)
        grids[scan.name] = TokenGrid.of(seen.patch[0].numpy(), seen.affine.numpy(), scan.name)

    def find(asked: Asked) -> np.ndarray:
        windows = [window_around(grids[asked.one.name], place) for place in asked.places_mm]
        return np.stack([best_place(window, grids[asked.other.name])[0] for window in windows])

    return find


def by_voxels(asked: Asked) -> np.ndarray:
    """By the most similar crop of as many voxels, compared by cosine about the mean of each head's crops."""
    searched = places_of(asked.other, REGION_VOX, SEARCH_VOX)
    flat = [places.windows.flatten(1) for places in (asked.crops, searched)]
    x, y = (F.normalize(windows - windows.mean(0), dim=1) for windows in flat)
    best = (x[torch.from_numpy(asked.rows)] @ y.T).argmax(1).numpy()
    return in_world(asked.other, centres_vox(searched, asked.other)[best])


def centres_vox(places: Places, scan: Scan) -> np.ndarray:
    """[N, 3] of crops, in voxels of the prepared scan."""
    return places.centres_mm / np.linalg.norm(scan.affine[:3, :3], axis=0)


def in_world(scan: Scan, voxels: np.ndarray) -> np.ndarray:
    """[N, 3] voxels of the prepared scan -> mm."""
    return voxels @ scan.affine[:3, :3].T + scan.affine[:3, 3]
