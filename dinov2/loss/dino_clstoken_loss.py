"""Image-level objective: the student's class tokens predict the teacher's of another crop (3DINO paper, L_image).

Shapes: S student crops, G teacher crops, B volumes, K prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2.loss.row_math import PLAIN, RowMath

STUDENT_TEMP = 0.1


def cross_entropy(scores: Tensor, target: Tensor, student_temp: float = STUDENT_TEMP, math: RowMath = PLAIN) -> Tensor:
    """Cross-entropy of each row, [..., K] and [..., K] -> [...], in at least float32.

    The gradient for the scores is made in the forward pass, while both are at hand, and kept in their dtype: the one [..., K]
    tensor besides scores and targets. The backward pass scales it in place, so it runs once. Targets get no gradient.
    """
    return _CrossEntropy.apply(scores, target, student_temp, math)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, target: Tensor, temp: float, math: RowMath) -> Tensor:
        loss, grad = math.cross_entropy_parts(scores, target, temp)
        ctx.temp = temp
        ctx.save_for_backward(grad)  # unscaled, with values up to 1: scaled by a row's weight first, it could vanish in fp16
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad.mul_((grad_loss / ctx.temp)[..., None]), None, None, None


def dino_loss(scores: Tensor, target: Tensor, skip_same_crop: bool = False, math: RowMath = PLAIN) -> Tensor:
    """Sum over pairs (student crop, teacher crop) of their cross-entropy, averaged over the batch.

    Args:
        scores: [S, B, K] student outputs.
        target: [G, B, K] teacher distributions.
        skip_same_crop: Leave out the pairs of a crop with itself (student and teacher hold the same crops).
        math: Plain or compiled.

    Returns:
        Scalar. All targets of one student crop share its log-partition, so they are summed first.
    """
    targets = target.sum(0, keepdim=True)  # [1, B, K]
    if skip_same_crop:
        targets = targets - target  # [S, B, K]
    return cross_entropy(scores, targets, math=math).mean(-1).sum()
