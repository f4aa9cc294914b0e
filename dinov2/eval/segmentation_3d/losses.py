"""The losses of the segmentation recipes, from MONAI."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from dinov2.data.downstream.recipes import IGNORED, Recipe


def build_loss(recipe: Recipe) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss of logits [B, R, H, W, D] and labels [B, 1, H, W, D].

    Dice alone or with cross-entropy; overlapping regions through a sigmoid each, classes through a softmax. Voxels that the
    recipe ignores take no part, neither in a sum of the Dice loss nor in the mean of the cross-entropy.

    Source: 3DINO paper, "3DINO segmentation".
    """
    if recipe.ignore:
        return _build_masked_loss(recipe)
    from monai.losses import DiceCELoss, DiceLoss

    kind = DiceCELoss if recipe.train.loss == "dice_ce" else DiceLoss
    loss = kind(squared_pred=recipe.train.dice_squared, sigmoid=recipe.overlapping, softmax=not recipe.overlapping)
    return lambda logits, labels: loss(logits.float(), recipe.masks(labels).float())


def _build_masked_loss(recipe: Recipe) -> Callable[[Tensor, Tensor], Tensor]:
    """As MONAI's losses on the voxels that are not ignored; those have probability 0 and truth 0."""
    from monai.losses import DiceLoss

    dice = DiceLoss(squared_pred=recipe.train.dice_squared)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        logits, truth, seen = logits.float(), recipe.masks(labels).float(), (labels != IGNORED).float()  # seen [B, 1, H, W, D]
        probabilities = logits.sigmoid() if recipe.overlapping else logits.softmax(1)
        total = dice(probabilities * seen, truth)  # the truth has no mask where a voxel is ignored
        if recipe.train.loss == "dice_ce":
            if logits.shape[1] == 1:
                entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
            else:
                entropy = F.cross_entropy(logits, truth, reduction="none")[:, None]  # [B, 1, H, W, D]
            total = total + (entropy * seen).sum() / seen.sum().clamp(min=1)
        return total

    return loss
