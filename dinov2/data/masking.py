"""Which patches of which global crops are masked: uniform over patches, no blocks (3DINO paper, "3DINO")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dinov2.streams import Kind, stream


@dataclass(frozen=True)
class MaskPlan:
    """Masks of all global crops of an effective batch, crop-major.

    Attributes:
        masks: [2B, N] bool, True = masked.
        upper_bounds: [2B] most masked patches that a row could have had.
    """

    masks: np.ndarray
    upper_bounds: np.ndarray


def plan_masks(
    seed: int, step: int, num_rows: int, num_patches: int, sample_probability: float, ratio_min_max: tuple[float, float]
) -> MaskPlan:
    """The masks of one step, the same for any number of ranks and workers.

    A share `sample_probability` of the rows is masked; their ratios step through `ratio_min_max` in equal bins, one
    bin a row; which row gets which is shuffled.
    """
    rng = stream(seed, Kind.MASKS, step)
    num_masked_rows = int(num_rows * sample_probability)
    edges = np.linspace(*ratio_min_max, num_masked_rows + 1)
    masks = np.zeros((num_rows, num_patches), dtype=bool)
    upper_bounds = np.zeros(num_rows, dtype=np.int64)
    for row, low, high in zip(rng.permutation(num_rows), edges[:-1], edges[1:], strict=False):
        count = int(num_patches * rng.uniform(low, high))
        masks[row, rng.permutation(num_patches)[:count]] = True
        upper_bounds[row] = int(num_patches * high)
    return MaskPlan(masks, upper_bounds)
