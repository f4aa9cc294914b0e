"""Position in the sample sequence -> crops of one volume."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from dinov2.data.augmentations import DataAugmentationDINO3d
from dinov2.data.cache import VolumeCache
from dinov2.data.datalist import Datalist
from dinov2.data.samplers import EndlessOrder
from dinov2.data.store import VolumeStore
from dinov2.data.streams import Kind, stream
from dinov2.errors import BadVolume

Sample = dict[str, Any]


class PretrainDataset(Dataset):
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

    def __getitem__(self, position: int) -> Sample:
        """`global_crops`, `local_crops` (lists of [1, s, s, s]), `sample_id`, `position`, `bad` {path: reason}.

        Where no volume of the list can be used, only `position` and `bad`.
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
            crops = self.augmentation(volume.voxels, rng, volume.spacing_mm)
            return {**crops, "sample_id": self.datalist.entries[index].image, "position": position, "bad": bad}
        return {"position": position, "bad": bad}
