"""Samples -> the batch of a training step, with its masks."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing import parent_process
from typing import Any

import numpy as np
import torch

from dinov2.data.augmentations import NUM_GLOBAL_CROPS
from dinov2.data.dataset import Sample
from dinov2.data.masking import plan_masks

Batch = dict[str, Any]


@dataclass(frozen=True)
class Collate:
    """Collation of one micro-batch of b volumes out of an effective batch of B.

    The masks are drawn for all 2B rows of the step; this micro-batch takes the rows of its own volumes.
    """

    seed: int
    effective_batch: int
    num_patches: int
    sample_probability: float
    ratio_min_max: tuple[float, float]

    def __call__(self, samples: list[Sample]) -> Batch:
        """Crop-major batch.

        Returns:
            `collated_global_crops` (2b, 1, G, G, G), `collated_local_crops` (L*b, 1, S, S, S), `collated_masks`
            (2b, N) bool, `mask_indices_list` (M,) into the flattened mask, `masks_weight` (M,) = 1 / masked patches of
            that row, `upperbound` int >= M, `n_masked_patches` (1,), `sample_ids`, `positions` (b,) int64, `bad`
            {path: reason}; only `bad` where no volume could be used.
        """
        bad = {path: reason for s in samples for path, reason in s["bad"].items()}
        if not all("global_crops" in s for s in samples):
            return {"bad": bad}
        positions = [s["position"] for s in samples]
        step, first = divmod(positions[0], self.effective_batch)
        masks, upperbound = self._masks(step, np.arange(first, first + len(samples)))
        return {
            "collated_global_crops": _crop_major(samples, "global_crops"),
            "collated_local_crops": _crop_major(samples, "local_crops"),
            "collated_masks": masks,
            "mask_indices_list": masks.flatten().nonzero().flatten(),
            "masks_weight": (1 / masks.sum(-1).clamp(min=1.0))[:, None].expand_as(masks)[masks],
            "upperbound": upperbound,
            "n_masked_patches": masks.sum().reshape(1),
            "sample_ids": [s["sample_id"] for s in samples],
            "positions": torch.tensor(positions, dtype=torch.int64),
            "bad": bad,
        }

    def _masks(self, step: int, volumes: np.ndarray) -> tuple[torch.Tensor, int]:
        plan = plan_masks(
            self.seed,
            step,
            NUM_GLOBAL_CROPS * self.effective_batch,
            self.num_patches,
            self.sample_probability,
            self.ratio_min_max,
        )
        rows = np.concatenate([volumes + crop * self.effective_batch for crop in range(NUM_GLOBAL_CROPS)])
        return torch.from_numpy(plan.masks[rows]), int(plan.upper_bounds[rows].sum())


def _crop_major(samples: list[Sample], key: str) -> torch.Tensor:
    """All samples' first crop, then all samples' second, ...; an empty tensor where there are none.

    In a loader process they are written straight into shared memory, so that crops are copied once.
    """
    crops = [s[key][i] for i in range(len(samples[0][key])) for s in samples]
    if not crops:
        return torch.empty(0)
    if parent_process() is None:
        return torch.stack(crops)
    one = crops[0]
    # what torch's default_collate calls in its own workers; there is no public way to new shared memory
    storage = torch.UntypedStorage._new_shared(len(crops) * one.numel() * one.element_size())
    return torch.stack(crops, out=one.new_empty(0).set_(storage, 0, (len(crops), *one.shape)))
