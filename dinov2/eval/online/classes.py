"""What evaluators of classes share: frozen features of both parts of a list, and the validation part's scores.

n cases, K classes, E embedding; features are the last class token beside the mean of its patch tokens [n, 2 E].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from dinov2.data.downstream.crops import central_cube
from dinov2.eval.metrics.classification import auc_per_class, balanced_accuracy, confusion
from dinov2.eval.online.labelled import PARTS, Alive, Labelled, require_task
from dinov2.eval.probing.parts import batch_features, labels_of, refuse_not_finite, require_every_class
from dinov2.models.backbone import Backbone

BATCH_SIZE = 16


class ClassEvaluator(ABC):
    """Classes of scans by the features of their middle.

    Args:
        labelled: Of a classification.

    Raises:
        BadInput: Of another task, or a part lacks a class.
    """

    metrics: ClassVar[dict[str, bool]] = {"auc": True, "balanced_accuracy": True}  # whether higher is better

    def __init__(self, labelled: Labelled) -> None:
        require_task(labelled, "classification")
        for part in PARTS:
            require_every_class(labelled.cases[part].items, labelled.recipe, part)
        self.name = labelled.name
        self.labelled = labelled

    @abstractmethod
    def probabilities(self, train: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Tensor:
        """[m, K] of queries [m, F], from training features [n, F] and labels [n]."""

    def __call__(self, backbone: Backbone, alive: Alive) -> dict[str, float]:
        cases, num_classes = self.labelled.cases, self.labelled.recipe.num_outputs
        train, queries = (self._features(backbone, part, alive) for part in PARTS)
        labels, truth = (labels_of(cases[part].items) for part in PARTS)
        scores, known = self.probabilities(train, labels, queries, num_classes).double().numpy(), truth.numpy()
        table = confusion(known, scores.argmax(1), num_classes)
        return {"auc": float(auc_per_class(scores, known).mean()), "balanced_accuracy": balanced_accuracy(table)}

    def _features(self, backbone: Backbone, part: str, alive: Alive) -> Tensor:
        cases, rows = self.labelled.cases[part], []
        for first in range(0, len(cases), BATCH_SIZE):
            cubes = []
            for i in range(first, min(first + BATCH_SIZE, len(cases))):
                cubes.append(central_cube(cases[i].image, self.labelled.size))
                alive()
            rows.append(batch_features(backbone, torch.stack(cubes), self.labelled.cfg, layers=1))
        features = torch.cat(rows)
        refuse_not_finite(features, cases.items, part)
        return features
