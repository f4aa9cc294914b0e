"""Numbers that tell a collapse within a hundred steps, from tensors that the step has anyway.

Shapes: X class tokens (all global crops of the step), E embedding, K prototypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.distributed import gather_rows
from dinov2.distributed.precision import at_least_fp32
from dinov2.loss.dino_clstoken_loss import STUDENT_TEMP


def mean_entropy(scores: Tensor) -> Tensor:
    """Mean entropy (nats) of softmax(scores / student temperature), [..., K] -> scalar."""
    log_p = torch.log_softmax(at_least_fp32(scores) / STUDENT_TEMP, -1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred rows: 1 (a line) to min(X - 1, E).

    In float64, rounded to float32 at the end: LAPACK's last bit depends on where its work memory lies, so two processes
    would otherwise write different metrics for equal weights.
    """
    centred = torch.nan_to_num(x.double() - x.double().mean(0, keepdim=True))  # svdvals raises on non-finite input
    s = torch.linalg.svdvals(centred)
    p = s / s.sum().clamp_min(torch.finfo(s.dtype).tiny)
    return torch.exp(torch.special.entr(p).sum()).float() + 0.0 * x.sum()  # non-finite input gives a non-finite rank


def mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine between different rows: near 1 means that all inputs look alike."""
    unit = F.normalize(x, dim=-1)
    n = x.shape[0]
    total = unit.sum(0).square().sum() - unit.square().sum()
    return total / max(n * (n - 1), 1)


@torch.no_grad()
def collapse_monitors(cls_tokens: Tensor, cls_scores: Tensor, cls_target: Tensor) -> dict[str, Tensor]:
    """Monitors of the teacher, over the rows of all ranks (`teacher_entropy`: this rank's mean).

    Args:
        cls_tokens: [X, E] normed class tokens.
        cls_scores: [X, K] head outputs.
        cls_target: [X, K] target distributions.

    Returns:
        `teacher_entropy` (nats, mean over targets; log K is a collapse to uniform), `prototypes_used` (different best
        prototypes among the scores; at most min(X, K), 1 is a collapse), `feature_rank`, `mean_cosine`.
    """
    tokens = gather_rows(at_least_fp32(cls_tokens))
    return {
        "teacher_entropy": torch.special.entr(cls_target).sum(-1).mean(),
        "prototypes_used": gather_rows(cls_scores.argmax(-1)).unique().numel() * torch.ones((), device=tokens.device),
        "feature_rank": effective_rank(tokens),
        "mean_cosine": mean_cosine(tokens),
    }
