"""KoLeo: class tokens of a batch are pushed away from their nearest neighbour (Sablayrolles et al., as in DINOv2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.distributed import gather_rows_with_grad, get_global_rank
from dinov2.distributed.precision import at_least_fp32


def koleo_loss(x: Tensor, eps: float = 1e-8, all_ranks: bool = False) -> Tensor:
    """Mean of -log(distance to the nearest neighbour) of the L2-normalised rows.

    Args:
        x: [B, E]; computed in at least float32, outside any autocast.
        eps: Keeps the logarithm finite.
        all_ranks: Neighbours are looked for among the rows of all ranks (each of which has B); the mean over ranks is then what
            one process gives for all rows. False: among this rank's own, as in the paper.

    Returns:
        Scalar, this rank's mean; 0 for fewer than two rows, which have no neighbour.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_fp32(x)
        x = F.normalize(x, eps=eps, dim=-1)
        others = gather_rows_with_grad(x) if all_ranks else x  # [O, E]
        if len(others) < 2:
            return x.sum() * 0.0
        with torch.no_grad():
            similarity = x @ others.T  # [B, O]
            own = torch.arange(len(x), device=x.device) + (get_global_rank() * len(x) if all_ranks else 0)
            nearest = similarity.scatter_(1, own[:, None], -1.0).argmax(1)
        distance = F.pairwise_distance(x, others[nearest], p=2, eps=eps)
        return -torch.log(distance + eps).mean()
