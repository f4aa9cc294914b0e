"""Image-level objective: the student's class tokens predict the teacher's of another crop (3DINO paper, L_image).

Shapes: S student crops, G teacher crops, B volumes, K prototypes.
"""

from __future__ import annotations

from torch import Tensor

from dinov2.loss.targets import at_least_fp32

STUDENT_TEMP = 0.1


def cross_entropy(scores: Tensor, target: Tensor, student_temp: float = STUDENT_TEMP) -> Tensor:
    """Cross-entropy of each row, [..., K] and [..., K] -> [...], in at least float32.

    -sum(t * log_softmax(s / temp)), written so that no [..., K] log-probability is kept for the backward pass besides
    the softmax itself.
    """
    x = at_least_fp32(scores) / student_temp
    return x.logsumexp(-1) * target.sum(-1) - (x * target).sum(-1)


def dino_loss(scores: Tensor, target: Tensor, skip_same_crop: bool = False) -> Tensor:
    """Sum over pairs (student crop, teacher crop) of their cross-entropy, averaged over the batch.

    Args:
        scores: [S, B, K] student outputs.
        target: [G, B, K] teacher distributions.
        skip_same_crop: Leave out the pairs of a crop with itself (student and teacher hold the same crops).

    Returns:
        Scalar. All targets of one student crop share its log-partition, so they are summed first.
    """
    targets = target.sum(0, keepdim=True)  # [1, B, K]
    if skip_same_crop:
        targets = targets - target  # [S, B, K]
    return cross_entropy(scores, targets).mean(-1).sum()
