"""Online kNN: classes of scans by votes of the most similar training scans, with one k that nothing chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2.eval.online.classes import ClassEvaluator
from dinov2.eval.probing.neighbours import knn_probabilities

NEIGHBOURS = 10


class NearestNeighbours(ClassEvaluator):
    """Weighted votes, as `dinov2 knn` has them."""

    def probabilities(self, train: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Tensor:
        votes = knn_probabilities(train.double().numpy(), labels.numpy(), queries.double().numpy(), NEIGHBOURS, num_classes)
        return torch.from_numpy(votes)
