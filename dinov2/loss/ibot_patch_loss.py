"""Patch-level objective: the student predicts the teacher's tokens at masked patches (3DINO paper, L_patch).

Shapes: M masked patches of this batch, X rows of the mask (all global crops, masked or not), N patches, K prototypes.
"""

from __future__ import annotations

from torch import Tensor

from dinov2.loss.dino_clstoken_loss import cross_entropy
from dinov2.loss.row_math import PLAIN, RowMath


def ibot_loss(
    scores: Tensor, target: Tensor, masks_weight: Tensor, num_rows: int, math: RowMath = PLAIN
) -> tuple[Tensor, Tensor]:
    """Cross-entropy at masked patches: averaged within each crop, then over crops.

    Args:
        scores: [M, K] student outputs at the masked patches; M may be 0.
        target: [M, K] teacher distributions there.
        masks_weight: [M], 1 / (masked patches of that crop).
        num_rows: X, by which the weighted sum is divided.
        math: Plain or compiled.

    Returns:
        The loss, and the plain mean over masked patches (without gradient), comparable with log K.
    """
    per_patch = cross_entropy(scores, target, math=math)  # [M]
    loss = (per_patch * masks_weight.to(per_patch.dtype)).sum() / num_rows
    return loss, per_patch.detach().sum() / max(per_patch.numel(), 1)
