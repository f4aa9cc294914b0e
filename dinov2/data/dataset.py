"""Position in the sample sequence -> crops of one volume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dinov2.data.augmentations import DataAugmentationDINO3d
from dinov2.data.cache.folder import VolumeCache
from dinov2.data.cache.store import VolumeStore
from dinov2.data.datalist import Datalist
from dinov2.data.preprocess import Volume
from dinov2.data.samplers import EndlessOrder
from dinov2.errors import BadVolume
from dinov2.streams import Kind, stream

Sample = dict[str, Any]


class Found(NamedTuple):
    """The volume of a position, and the stream from which everything about the position's crops is drawn next."""

    volume: Volume
    rng: np.random.Generator
    name: str


class Volumes:
    """Volumes by position; one that cannot be used is replaced by the next of the list with the same stream.

    Args:
        datalist: The volumes.
        seed: Of order and crops.
        store_bytes: Voxel bytes kept in memory.
        cache: Folder of preprocessed volumes on disk.
    """

    def __init__(self, datalist: Datalist, seed: int, store_bytes: int, cache: VolumeCache | None = None) -> None:
        self.datalist = datalist
        self.seed = seed
        self.order = EndlessOrder(len(datalist), seed)
        self.store = VolumeStore(datalist.entries, store_bytes, cache)

    def find(self, position: int, bad: dict[str, str]) -> Found | None:
        """The volume of a position; None where none of the list can be used. `bad` gets {path: reason} of those replaced."""
        first = self.order(position)
        for step in range(len(self.datalist)):
            index = (first + step) % len(self.datalist)
            rng = stream(self.seed, Kind.SAMPLE, position)
            try:
                volume = self.store.get(index, rng)
            except BadVolume as err:
                bad[self.datalist.entries[index].image] = str(err)
                continue
            return Found(volume, rng, self.datalist.entries[index].image)
        return None


class PretrainDataset(Volumes):
    """Crops by position.

    Args:
        datalist: The volumes.
        augmentation: Volume -> crops.
        seed: Of order and crops.
        store_bytes: Voxel bytes kept in memory.
        cache: Folder of preprocessed volumes on disk.
    """

    def __init__(
        self,
        datalist: Datalist,
        augmentation: DataAugmentationDINO3d,
        seed: int,
        store_bytes: int,
        cache: VolumeCache | None = None,
    ) -> None:
        super().__init__(datalist, seed, store_bytes, cache)
        self.augmentation = augmentation

    def draw(self, position: int, out: Sequence[Tensor]) -> Sample:
        """Write the crops of a position into `out`, global before local, [1, s, s, s] each.

        Returns:
            `sample_id` and `bad` {path: reason}; where no volume of the list can be used, only `bad`.
        """
        bad: dict[str, str] = {}
        found = self.find(position, bad)
        if found is None:
            return {"bad": bad}
        self.augmentation.write(found.volume.voxels, out, found.rng, found.volume.spacing_mm)
        return {"sample_id": found.name, "bad": bad}
