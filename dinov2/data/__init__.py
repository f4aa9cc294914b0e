"""Datalist -> volume -> plan -> crops -> batch; one file per arrow."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dinov2.data.datalist import Datalist, Entry, read_datalist, write_datalist

if TYPE_CHECKING:
    from dinov2.data.augmentations import DataAugmentationDINO3d
    from dinov2.data.collate import collate_data_and_cast
    from dinov2.data.loaders import SamplerType, TrainLoader, make_data_loader, make_dataset_3d
    from dinov2.data.masking import MaskingGenerator3d
    from dinov2.data.transforms import CropForegroundSwapSliceDims

__all__ = [
    "CropForegroundSwapSliceDims", "DataAugmentationDINO3d", "Datalist", "Entry", "MaskingGenerator3d", "SamplerType",
    "TrainLoader", "collate_data_and_cast", "make_data_loader", "make_dataset_3d", "read_datalist", "write_datalist",
]  # fmt: skip

_WHEN_ASKED_FOR = {
    "CropForegroundSwapSliceDims": "transforms",
    "DataAugmentationDINO3d": "augmentations",
    "MaskingGenerator3d": "masking",
    "SamplerType": "loaders",
    "TrainLoader": "loaders",
    "collate_data_and_cast": "collate",
    "make_data_loader": "loaders",
    "make_dataset_3d": "loaders",
}


def __getattr__(name: str) -> Any:
    """What brings torch along, imported when it is first asked for: lists and volumes are read without it."""
    if name in _WHEN_ASKED_FOR:
        return getattr(importlib.import_module(f"dinov2.data.{_WHEN_ASKED_FOR[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
