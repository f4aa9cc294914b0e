"""The losses of the segmentation recipes, from MONAI."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dinov2.data.downstream.recipes import Recipe


def build_loss(recipe: Recipe) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss of logits [B, R, H, W, D] and labels [B, 1, H, W, D].

    Dice alone or with cross-entropy; overlapping regions through a sigmoid each, classes through a softmax.

    Source: 3DINO paper, "3DINO segmentation".
    """
    from monai.losses import DiceCELoss, DiceLoss

    kind = DiceCELoss if recipe.train.loss == "dice_ce" else DiceLoss
    loss = kind(squared_pred=recipe.train.dice_squared, sigmoid=recipe.overlapping, softmax=not recipe.overlapping)
    return lambda logits, labels: loss(logits.float(), recipe.masks(labels).float())
