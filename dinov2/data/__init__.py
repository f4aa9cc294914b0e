"""Datalist -> volume -> plan -> crops -> batch; one file per arrow."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dinov2.data.datalist import Datalist, Entry, read_datalist, write_datalist

if TYPE_CHECKING:
    from dinov2.data.augmentations import DataAugmentationDINO3d
    from dinov2.data.loaders import TrainLoader

__all__ = ["DataAugmentationDINO3d", "Datalist", "Entry", "TrainLoader", "read_datalist", "write_datalist"]

_WITH_TORCH = {"DataAugmentationDINO3d": "augmentations", "TrainLoader": "loaders"}


def __getattr__(name: str) -> Any:
    """What brings torch along, imported when it is first asked for: lists and volumes are read without it."""
    if name in _WITH_TORCH:
        return getattr(importlib.import_module(f"dinov2.data.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
