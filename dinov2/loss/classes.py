"""DINOv2's loss modules: its names and calls, the arithmetic of this package's functions.

Shapes: B volumes, N patches, M masked patches, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dinov2.loss.dino_clstoken_loss import STUDENT_TEMP, cross_entropy
from dinov2.loss.koleo_loss import koleo_loss
from dinov2.loss.targets import TeacherCenter, sinkhorn_knopp


class _TeacherLoss(TeacherCenter):
    """What both have: targets by centring, whose update is a call of its own, or by Sinkhorn-Knopp."""

    def __init__(self, out_dim: int, student_temp: float = STUDENT_TEMP, center_momentum: float = 0.9) -> None:
        super().__init__(out_dim, center_momentum)
        self.student_temp = student_temp

    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        return self.targets(teacher_output, teacher_temp)

    def update_center(self, teacher_output: Tensor) -> None:
        self.remember(teacher_output.flatten(0, -2))


class DINOLoss(_TeacherLoss):
    """`dino_loss`, `sinkhorn_knopp` and `TeacherCenter` as one module."""

    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3) -> Tensor:
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def forward(  # type: ignore[override]  # a loss, where the base class makes targets
        self, student_output_list: Iterable[Tensor], teacher_out_softmaxed_centered_list: Iterable[Tensor]
    ) -> Tensor:
        """Sum over all pairs of their mean cross-entropy, [B, K] each."""
        target = torch.stack(tuple(teacher_out_softmaxed_centered_list)).sum(0)
        return torch.stack([cross_entropy(s, target, self.student_temp).mean() for s in student_output_list]).sum()


class iBOTPatchLoss(_TeacherLoss):
    """`ibot_loss`, `sinkhorn_knopp` and `TeacherCenter` as one module."""

    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_masked_patches_tensor: Tensor | None = None, n_iterations: int = 3
    ) -> Tensor:
        """The number of masked patches has no influence: it cancels, the rows are counted."""
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def forward(  # type: ignore[override]  # as of DINOLoss
        self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor
    ) -> Tensor:
        """Scores and targets of all patches, [B, N, K]; masks [B, N] bool."""
        masks = student_masks_flat
        return self.forward_masked(student_patch_tokens[masks], teacher_patch_tokens[masks], masks)

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """Those of masked patches, [M, K], or of more rows of which the first `n_masked_patches` count."""
        masks = student_masks_flat
        if masks_weight is None:
            masks_weight = (1 / masks.sum(-1).clamp(min=1.0))[:, None].expand_as(masks)[masks]
        scores, target = student_patch_tokens_masked[:n_masked_patches], teacher_patch_tokens_masked[:n_masked_patches]
        return (cross_entropy(scores, target, self.student_temp) * masks_weight).sum() / len(masks)


class KoLeoLoss(nn.Module):
    """`koleo_loss` as a module."""

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        return koleo_loss(student_output, eps)
