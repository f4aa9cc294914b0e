"""What all evaluations of frozen features share: subsets, labels and features of whole parts.

n cases, F features: class tokens of the last layers, then the mean of the last layer's patch tokens (`class_features`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from torch import Tensor

from dinov2.data.downstream.cases import Cases
from dinov2.data.downstream.crops import central_cube
from dinov2.data.downstream.lists import Item, select_percent
from dinov2.data.downstream.recipes import Recipe
from dinov2.data.workers import compute_in_order
from dinov2.distributed import gather_objects
from dinov2.distributed.precision import evaluation_autocast
from dinov2.errors import BadInput
from dinov2.eval.probing.linear_heads import LAYER_CHOICES
from dinov2.eval.run import Setting
from dinov2.features.features import class_features
from dinov2.logging.progress import track
from dinov2.models.backbone import Backbone


def require_every_class(items: Sequence[Item], recipe: Recipe, part: str) -> None:
    """Raise `BadInput` where a part lacks one of the classes: it could be neither learnt nor scored."""
    if recipe.num_outputs < 2:
        raise BadInput(f"{recipe.name}: its recipe has one class only ({recipe.output_names[0]}): name two or more")
    present = {item.label for item in items}
    absent = [name for k, name in enumerate(recipe.output_names) if k not in present]
    if absent:
        advice = "split again, use a larger --dataset-percent, or leave the class out of the recipe"
        raise BadInput(f"{recipe.name}, {part}: none of its {len(items)} cases is {', '.join(absent)}: {advice}")


def training_items(cases: Cases, percent: float, seed: int) -> Cases:
    """A seed's own random subset of the training part."""
    items = select_percent(cases.items, percent, seed)
    folder = cases.cache.folder if cases.cache else None
    return Cases(items, cases.recipe, cache_dir=folder)


def feature_layers(backbone: Backbone) -> int:
    """Layers whose class tokens features hold: four, or all of a shallower network."""
    return min(max(LAYER_CHOICES), backbone.num_layers)


@torch.no_grad()
def part_features(setting: Setting, backbone: Backbone, cases: Cases, part: str) -> Tensor:
    """Features [n, F] of the middle of every case, on the CPU; the ranks share the work, every one has all.

    Raises:
        BadInput: A case cannot be prepared, or its features are not finite.
    """
    request, layers = setting.request, feature_layers(backbone)
    mine = list(range(setting.runtime.rank, len(cases), setting.runtime.world_size))
    endless = (mine[i % len(mine)] for i in range(10**12)) if mine else iter(())
    num_workers = min(request.num_workers, len(mine))
    views = compute_in_order(lambda i: central_cube(cases[i].image, request.cube), endless, num_workers)
    rows: dict[int, Tensor] = {}
    for first in track(range(0, len(mine), request.batch_size), f"batches of {part} features"):
        chosen = mine[first : first + request.batch_size]
        images = torch.stack([next(views) for _ in chosen])
        rows |= dict(zip(chosen, batch_features(backbone, images, setting.cfg, layers), strict=True))
    views.close()
    rows = {i: row for of_rank in gather_objects(rows) for i, row in of_rank.items()}
    features = torch.stack([rows[i] for i in range(len(cases))])
    refuse_not_finite(features, cases.items, part)
    return features


@torch.no_grad()
def batch_features(backbone: Backbone, images: Tensor, cfg: DictConfig, layers: int) -> Tensor:
    """`class_features` of images [B, C, s, s, s], as float32 on the CPU, in the dtype that the configuration evaluates in."""
    device = next(backbone.parameters()).device
    with evaluation_autocast(cfg, device.type):
        return class_features(backbone, images.to(device), layers).cpu()


def refuse_not_finite(features: Tensor, items: Sequence[Item], part: str) -> None:
    """Raise `BadInput` where a case's features [n, F] are not finite."""
    bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise BadInput(
            f"{part}: the features of {len(bad)} cases are not finite ({items[bad[0]].case}, ...): the weights are damaged or "
            "overflow"
        )


def labels_of(items: Sequence[Item]) -> Tensor:
    """Class numbers [n] int64, or values [n] float64 of a regression."""
    return torch.tensor([item.label for item in items])


def groups_of(items: Sequence[Item]) -> list[str]:
    """Patient of each case, the case itself where the list does not say."""
    return [item.patient or item.case for item in items]
