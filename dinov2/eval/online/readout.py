"""Online read-out: labels of patches by a linear map of their tokens (`measures/dense_readout.py`), few crops of few scans.

Shapes: C crops, s their edge (voxels), h w d patches, F features.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dinov2.data.downstream.cases import Case, Cases
from dinov2.data.downstream.recipes import IGNORED
from dinov2.distributed.precision import evaluation_autocast
from dinov2.errors import BadInput
from dinov2.eval.measures.dense_readout import LabelledCrops, cut_crops, read_out
from dinov2.eval.online.labelled import Alive, Labelled, require_task
from dinov2.eval.probing.parts import feature_layers
from dinov2.features.features import patch_features
from dinov2.models.backbone import Backbone

MAX_SCANS = 20  # of a part, the list's first
CROPS_PER_SCAN = 8
CHOOSING_SHARE = 5  # every fifth training scan chooses the penalty instead of being learnt from


class ReadOut:
    """Dice of the validation part's patches; every label value but 0 counts, also where a recipe's regions overlap.

    Args:
        labelled: Of a segmentation.

    Raises:
        BadInput: Of another task, or fewer than two training scans.
    """

    metrics: ClassVar[dict[str, bool]] = {"dice": True}

    def __init__(self, labelled: Labelled) -> None:
        require_task(labelled, "segmentation")
        if len(labelled.cases["training"]) < 2:
            raise BadInput(
                "its training part has one case: a read-out learns from one and chooses by another, give two or more"
            )
        self.name = labelled.name
        self.labelled = labelled
        self.values = torch.tensor(labelled.recipe.values)

    def __call__(self, backbone: Backbone, alive: Alive) -> dict[str, float]:
        training, held_out = (self._crops(part, number, alive) for number, part in enumerate(("training", "validation")))
        choosing = training[::CHOOSING_SHARE]
        fitted = [crops for i, crops in enumerate(training) if i % CHOOSING_SHARE]
        if len(torch.cat([crops.labels.flatten() for crops in fitted]).unique()) < 2:
            raise BadInput(f"{self.name}: the crops of its training cases hold one label alone: there is nothing to tell apart")
        parts = {"training": fitted, "validation": choosing, "test": held_out}

        def extract(windows: Tensor) -> Tensor:
            alive()
            return self._tokens(backbone, windows)

        found = read_out(extract, parts, [len(fitted)], backbone.patch_size, len(self.values))
        return {"dice": float(np.nanmean(found[len(fitted)]))}

    def _crops(self, part: str, number: int, alive: Alive) -> list[LabelledCrops]:
        """The same ones at every call."""
        cases: Cases = self.labelled.cases[part]
        crops = []
        for i in range(min(len(cases), MAX_SCANS)):
            case, rng = cases[i], np.random.default_rng([number, i])
            crops.append(cut_crops(case.image, self._labels(case), [self.labelled.size] * 3, CROPS_PER_SCAN, rng))
            alive()
        return crops

    def _labels(self, case: Case) -> Tensor:
        """[H, W, D] places of the label values among the recipe's; what its recipe ignores is -1."""
        label = case.truth[0].long()
        return torch.where(label == IGNORED, -1, torch.searchsorted(self.values, label))

    def _tokens(self, backbone: Backbone, windows: Tensor) -> Tensor:
        """[C, channels, s, s, s] -> [C, h, w, d, F], of several channels their mean."""
        with evaluation_autocast(self.labelled.cfg, next(backbone.parameters()).device.type):
            tokens = patch_features(backbone, windows.flatten(0, 1)[:, None], feature_layers(backbone))
        tokens = tokens.float().unflatten(0, windows.shape[:2]).mean(1)
        if not tokens.isfinite().all():
            raise BadInput(f"{self.name}: patch tokens are not finite: the weights are damaged or overflow")
        return tokens
