"""Teacher scores to target distributions: Sinkhorn-Knopp or centring. Both work over the tokens of all ranks.

Shapes: R rows (class tokens or masked patches of this rank), K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2.distributed import all_reduce_max, all_reduce_sum, global_count
from dinov2.distributed.precision import at_least_fp32
from dinov2.loss.row_math import PLAIN, RowMath

_TINY = 1e-30  # keeps an unused prototype from dividing by zero, and its quotient from overflowing


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, temp: float, num_iters: int = 3, math: RowMath = PLAIN) -> Tensor:
    """Targets whose prototypes are used equally often over all rows of all ranks.

    Args:
        scores: [R, K] teacher outputs; R may be 0 on a rank.
        temp: Teacher temperature.
        num_iters: Rounds of normalising prototypes, then rows.
        math: Plain or compiled.

    Returns:
        [R, K] in at least float32; rows sum to 1.

    What the rounds change is one factor per row and one per prototype, so that a round is two products of the matrix with a
    vector. Each row's largest score is taken off before the exponential and given back as the first factors of the rows, which
    leaves the result as it is: no score is too large, and no row vanishes.

    Source: SwAV's Sinkhorn-Knopp as used by DINOv2; 3DINO paper, "DINOv2".
    """
    num_prototypes = scores.shape[1]
    if scores.numel():
        q, row_max = math.exponentials(scores, temp)  # [R, K], every row has a 1; [R, 1]
        largest = row_max.max()
    else:
        q, row_max = at_least_fp32(scores), at_least_fp32(scores).new_zeros(0, 1)
        largest = q.new_full((), torch.finfo(q.dtype).min)
    num_rows = global_count(len(q), q)
    rows = torch.exp(row_max - all_reduce_max(largest)).squeeze(1)  # [R]
    columns = q.new_ones(num_prototypes)  # [K]
    for _ in range(num_iters):
        columns = (all_reduce_sum(q.T @ rows) * num_prototypes).clamp_min(_TINY).reciprocal()
        rows = (q @ columns * num_rows).clamp_min(_TINY).reciprocal()
    return math.scaled(q, (rows * num_rows)[:, None], columns)


class TeacherCenter(nn.Module):
    """Centring: softmax of the scores less a running mean, which is updated at its next use (DINO, eq. 4).

    Args:
        out_dim: Prototypes K.
        momentum: Of the running mean.
    """

    center: Tensor
    pending: Tensor
    has_pending: Tensor

    def __init__(self, out_dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("pending", torch.zeros(1, out_dim))  # batch mean not yet applied
        self.register_buffer("has_pending", torch.tensor(False))

    @torch.no_grad()
    def forward(self, scores: Tensor, temp: float) -> Tensor:
        """[R, K] scores -> [R, K] targets in at least float32; remembers this batch's mean for the next call."""
        targets = self.targets(scores, temp)
        self.remember(scores)
        return targets

    @torch.no_grad()
    def targets(self, scores: Tensor, temp: float) -> Tensor:
        """[..., K] scores -> [..., K] targets, by all that was remembered before."""
        self.apply_center_update()
        return torch.softmax((at_least_fp32(scores) - self.center) / temp, -1)

    @torch.no_grad()
    def remember(self, scores: Tensor) -> None:
        """Keep the mean of [R, K] scores of all ranks for the next use."""
        total = all_reduce_sum(at_least_fp32(scores).sum(0, keepdim=True))
        num_rows = global_count(scores.shape[0], total)
        self.pending.copy_(total / num_rows.clamp_min(1))
        self.has_pending.copy_((num_rows > 0) & total.isfinite().all())  # a non-finite step leaves no trace

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Move the centre towards the remembered mean, once."""
        moved = self.center * self.momentum + self.pending * (1 - self.momentum)
        self.center.copy_(torch.where(self.has_pending, moved, self.center))
        self.has_pending.fill_(False)
