"""Datalist -> volume -> plan -> crops -> batch; one file per arrow."""

from dinov2.data.augmentations import DataAugmentationDINO3d
from dinov2.data.datalist import Datalist, Entry, read_datalist, write_datalist
from dinov2.data.loaders import TrainLoader

__all__ = ["DataAugmentationDINO3d", "Datalist", "Entry", "TrainLoader", "read_datalist", "write_datalist"]
