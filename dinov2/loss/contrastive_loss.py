"""Contrast of two views: NT-Xent (Chen et al., "A simple framework for contrastive learning ...", equation 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.distributed import gather_rows_with_grad, get_global_rank
from dinov2.distributed.precision import at_least_fp32


def contrastive_loss(one: Tensor, other: Tensor, temperature: float = 0.5) -> Tensor:
    """Mean cross-entropy of telling a row's other view among the rows of both views of all volumes, of all ranks.

    Args:
        one, other: [B, F], the views of the same volumes; computed in at least float32, outside any autocast. Each rank has B.
        temperature: Of the cosines.

    Returns:
        Scalar (nats), this rank's mean; the mean over ranks is what one process gives for all rows.
    """
    with torch.autocast(one.device.type, enabled=False):
        views = [F.normalize(at_least_fp32(x), dim=-1) for x in (one, other)]
        rows = torch.cat([gather_rows_with_grad(x) for x in views])  # [2O, F], view-major
        b, o = len(one), len(rows) // 2
        own = get_global_rank() * b + torch.arange(b, device=one.device)
        own = torch.cat([own, own + o])  # [2B], this rank's rows
        scores = torch.cat(views) @ rows.T / temperature  # [2B, 2O]
        scores = scores.scatter(1, own[:, None], -torch.inf)  # a row is not among its own candidates
        return F.cross_entropy(scores, (own + o) % (2 * o))
