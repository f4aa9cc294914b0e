"""Position in the sample sequence -> crops of one volume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dinov2.data.augmentations import DataAugmentationDINO3d
from dinov2.data.cache.folder import VolumeCache
from dinov2.data.cache.store import VolumeStore
from dinov2.data.datalist import Datalist
from dinov2.data.samplers import EndlessOrder
from dinov2.errors import BadVolume
from dinov2.streams import Kind, stream

Sample = dict[str, Any]


class PretrainDataset:
    """Crops by position; a volume that cannot be used is replaced by the next of the list with the same stream.

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
        self.datalist = datalist
        self.augmentation = augmentation
        self.seed = seed
        self.order = EndlessOrder(len(datalist), seed)
        self.store = VolumeStore(datalist.entries, store_bytes, cache)

    def draw(self, position: int, out: Sequence[Tensor]) -> Sample:
        """Write the crops of a position into `out`, global before local, [1, s, s, s] each.

        Returns:
            `sample_id` and `bad` {path: reason}; where no volume of the list can be used, only `bad`.
        """
        first = self.order(position)
        bad: dict[str, str] = {}
        for step in range(len(self.datalist)):
            index = (first + step) % len(self.datalist)
            rng = stream(self.seed, Kind.SAMPLE, position)
            try:
                volume = self.store.get(index, rng)
            except BadVolume as err:
                bad[self.datalist.entries[index].image] = str(err)
                continue
            self.augmentation.write(volume.voxels, out, rng, volume.spacing_mm)
            return {"sample_id": self.datalist.entries[index].image, "bad": bad}
        return {"bad": bad}
