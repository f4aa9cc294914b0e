"""Crops and masks of a run's first step, drawn again from its own configuration, list and seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dinov2.data import TrainLoader
from dinov2.data.collate import Batch
from dinov2.data.datalist import Datalist
from dinov2.errors import BadInput
from dinov2.visual.crops import COLUMNS, Crop, crops_png
from dinov2.visual.figure_page import Chapter, Picture

MOST_VOLUMES = 3


def example_chapter(cfg: DictConfig, datalist: Datalist | None, effective_batch: int) -> Chapter:
    """What the first step of a run was shown, of a few of its volumes.

    Args:
        cfg: Of the run.
        datalist: Its list; None where it is not there any more.
        effective_batch: Volumes of a step.
    """
    chapter = Chapter("Crops and masks", is_grid=True)
    if datalist is None:
        chapter.lines.append("Not drawn, because the list is not there as it was.")
        return chapter
    try:
        batch, count = first_batch(cfg, datalist, effective_batch)
    except (BadInput, OSError) as err:
        chapter.lines.append(f"Not drawn: {err}.")
        return chapter
    for volume, tiles in enumerate(tiles_of(cfg, batch, count)):
        chapter.pictures.append(Picture(crops_png(tiles), f"Volume {volume + 1} of the first step."))
    again = "Drawn again from the configuration, list and seed of the run, as the network sees them"
    hidden = " Patches that the student does not see are blue." if cfg.train.objective == "3dino" else ""
    chapter.lines.append(f"{again}: cubes, whatever their extent in mm; the middle plane of each.{hidden}")
    return chapter


def first_batch(cfg: DictConfig, datalist: Datalist, effective_batch: int) -> tuple[Batch, int]:
    """The first volumes of a run's first step with their masks, as whichever rank had them, and how many these are.

    Raises:
        BadInput: None of the list can be used.
    """
    count = max(n for n in range(1, MOST_VOLUMES + 1) if effective_batch % n == 0)
    own = cfg.copy()
    OmegaConf.set_readonly(own, False)
    own.train.batch_size_per_gpu, own.train.accumulation_steps, own.train.num_workers = count, 1, 0
    own.train.cache_dir, own.train.memory_store_mb = "", 0  # nothing is written anywhere
    loader = TrainLoader(own, datalist, 0, 0, effective_batch // count)  # a rank of few volumes has the same ones of a step
    with closing(iter(loader)) as steps:
        return next(steps)[0], count


def tiles_of(cfg: DictConfig, batch: Mapping[str, Any], count: int) -> Iterator[list[Crop]]:
    """The tiles of each volume; crops of a batch are crop-major."""
    crops, locals_ = batch["collated_global_crops"], batch["collated_local_crops"]
    for volume in range(count):
        views, others = crops[volume::count], locals_[volume::count]
        tiles: list[Crop] = []
        for i, view in enumerate(views):
            if cfg.train.objective == "swin":
                tiles += [Crop(f"view {i + 1}", _voxels(view)), Crop("as it is seen", _voxels(others[i]))]
                continue
            edge = cfg.crops.global_crops_size // cfg.student.patch_size
            mask = batch["collated_masks"][i * count + volume].numpy().reshape(edge, edge, edge)
            hidden = f"masked {mask.mean():.0%}" if mask.any() else "not masked"
            tiles += [Crop(f"global crop {i + 1}", _voxels(view)), Crop(hidden, _voxels(view), mask)]
        if cfg.train.objective == "3dino":
            tiles += [Crop(f"local crop {i + 1}", _voxels(crop)) for i, crop in enumerate(others[:COLUMNS])]
        yield tiles


def _voxels(crop: Tensor) -> np.ndarray:
    """[1, s, s, s] -> [s, s, s] float32."""
    return crop[0].float().numpy()
