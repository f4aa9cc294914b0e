"""KoLeo: class tokens of a batch are pushed away from their nearest neighbour (Sablayrolles et al., as in DINOv2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.loss.targets import at_least_fp32


def koleo_loss(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean of -log(distance to the nearest neighbour) of the L2-normalised rows.

    Args:
        x: [B, E]; computed in at least float32, outside any autocast.
        eps: Keeps the logarithm finite.

    Returns:
        Scalar; 0 for fewer than two rows, which have no neighbour.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_fp32(x)
        if x.shape[0] < 2:
            return x.sum() * 0.0
        x = F.normalize(x, eps=eps, dim=-1)
        with torch.no_grad():
            similarity = x @ x.T  # [B, B]
            nearest = similarity.fill_diagonal_(-1).argmax(1)
        distance = F.pairwise_distance(x, x[nearest], p=2, eps=eps)
        return -torch.log(distance + eps).mean()
