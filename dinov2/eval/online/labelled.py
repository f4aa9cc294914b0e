"""A labelled list as an online task sees it: its training and validation part, prepared and kept in the cache folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from dinov2.data.downstream.cases import Cases, check_headers
from dinov2.data.downstream.lists import read_downstream_datalist, with_tertiles
from dinov2.data.downstream.recipes import Recipe, load_recipe
from dinov2.errors import BadInput

PARTS = ("training", "validation")
Alive = Callable[[], None]  # called now and then by what takes long, for the ranks that wait


@dataclass(frozen=True)
class Labelled:
    """What a task works with.

    Attributes:
        name: Of the task.
        recipe: Of the list; of a classification with shape and bins in numbers.
        cases: Of each of `PARTS`.
        size: Edge of what the network is shown (voxels), a multiple of its patches.
        cfg: The run's.
    """

    name: str
    recipe: Recipe
    cases: dict[str, Cases]
    size: int
    cfg: DictConfig


def open_labelled(task: DictConfig, cfg: DictConfig, output_dir: Path) -> Labelled:
    """Check an entry of `evaluation.tasks`: recipe, list, the headers of its cases.

    Raises:
        BadInput: What cannot be used.
    """
    recipe, size = load_recipe(task.dataset), task.size or cfg.crops.global_crops_size
    if size % cfg.student.patch_size:
        raise BadInput(f"size={size} is not a multiple of student.patch_size={cfg.student.patch_size}: use one that is")
    if recipe.task == "classification":
        recipe = with_tertiles(recipe, task.base_data_dir)
        recipe = recipe if recipe.resize is not None else dataclasses.replace(recipe, resize=[size] * 3)
    splits = read_downstream_datalist(task.base_data_dir, recipe)
    cache = cfg.train.cache_dir or output_dir / "cache"
    cases = {part: Cases(splits[part], recipe, cache_dir=cache, cache_max_gb=cfg.train.cache_max_gb) for part in PARTS}
    for part in PARTS:
        check_headers(cases[part].items, recipe)
    return Labelled(task.name or f"{task.kind}-{recipe.name}", recipe, cases, size, cfg)


def require_task(labelled: Labelled, task: str) -> None:
    """Raise `BadInput` where the list is of another task than the evaluator is for."""
    if labelled.recipe.task != task:
        raise BadInput(f"its recipe is for {labelled.recipe.task}, this kind of task needs one for {task}")
