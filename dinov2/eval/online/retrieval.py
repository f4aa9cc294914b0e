"""Online retrieval: is the crop that looks most alike in another scan the same place (`measures/region_retrieval.py`)?

The asking scan is turned and its contrast changed. No label is read: any list of scans of one part of the body will do.

Shapes: N crops of a scan, s their edge (voxels), E embedding.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dinov2.data.cache.store import load_volume
from dinov2.data.datalist import Entry
from dinov2.data.volumes.opening import describe
from dinov2.errors import BadInput
from dinov2.eval.measures.region_retrieval import Places, median_errors, places_of
from dinov2.eval.online.labelled import Alive, Labelled
from dinov2.eval.probing.parts import batch_features
from dinov2.features.scans import Scan
from dinov2.models.backbone import Backbone

MAX_SCANS = 6  # of the validation part, the list's first: each asks every other
BATCH_SIZE = 32


class Retrieval:
    """Median distance (mm) of the found place from the corresponding one, mean of the scans that ask.

    Args:
        labelled: Of any task; of each case the first image.

    Raises:
        BadInput: One scan alone.
    """

    metrics: ClassVar[dict[str, bool]] = {"median_mm": False}

    def __init__(self, labelled: Labelled) -> None:
        if len(labelled.cases["validation"]) < 2:
            raise BadInput("its validation part has one case: a place is looked for in other scans, give two or more")
        self.name = labelled.name
        self.labelled = labelled
        items = labelled.cases["validation"].items[:MAX_SCANS]
        self.scans = [Entry(item.images[0], tuple(describe(item.images[0])["shape"])) for item in items]

    def __call__(self, backbone: Backbone, alive: Alive) -> dict[str, float]:
        size = self.labelled.size
        searched: list[tuple[Places, Tensor]] = []
        asking: list[tuple[Places, Tensor]] = []
        for i, entry in enumerate(self.scans):
            scan = self._scan(entry)
            searched.append(self._seen(backbone, scan, max(1, size // 2), None, alive))
            asking.append(self._seen(backbone, scan, size, np.random.default_rng(i), alive))
        (asking_at, asked), (searched_at, found) = (list(zip(*pairs, strict=True)) for pairs in (asking, searched))
        return {"median_mm": float(np.mean(median_errors(asking_at, asked, searched_at, found)))}

    def _scan(self, entry: Entry) -> Scan:
        """As for pretraining, of several time points the first; from the cache folder, where it is kept."""
        volume = load_volume(entry, 0, self.labelled.cases["validation"].cache)
        if min(volume.stored.shape[1:]) < self.labelled.size:
            raise BadInput(f"{entry.image}: is smaller than a crop of {self.labelled.size} voxels: set the task's size lower")
        return Scan(entry.image, volume.stored, np.diag([*volume.spacing_mm, 1.0]))

    def _seen(
        self, backbone: Backbone, scan: Scan, step: int, rng: np.random.Generator | None, alive: Alive
    ) -> tuple[Places, Tensor]:
        """Where a scan's crops lie, without their voxels, and their mean patch tokens [N, E]."""
        crops = places_of(scan, self.labelled.size, step, rng)
        if not len(crops.windows):
            raise BadInput(f"{scan.name}: holds no crop of {self.labelled.size} voxels: set the task's size lower")
        rows = []
        for part in crops.windows.split(BATCH_SIZE):
            rows.append(batch_features(backbone, part, self.labelled.cfg, layers=1)[:, -backbone.embed_dim :])
            alive()
        features = torch.cat(rows)
        if not features.isfinite().all():
            raise BadInput(f"{self.name}: features are not finite: the weights are damaged or overflow")
        return dataclasses.replace(crops, windows=crops.windows[:0].clone()), features
