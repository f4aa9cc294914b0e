"""Which patches of which global crops are masked: uniform over patches, no blocks (3DINO paper, "3DINO")."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinov2.geometry import Size3, triple
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


class MaskingGenerator3d:
    """3DINO's call for the mask of one crop: as many patches as are asked for, anywhere.

    Draws from Python's `random`, as DINOv2's; a run's own masks are of `plan_masks`.

    Args:
        input_size: Patches along an edge, or along (h, w, d).
        num_masking_patches, min_num_patches, max_num_patches, min_aspect, max_aspect: Of DINOv2's blocks, which 3DINO has not;
            accepted, no effect.
    """

    def __init__(
        self,
        input_size: int | Sequence[int],
        num_masking_patches: int | None = None,
        min_num_patches: int = 4,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ) -> None:
        self.size = triple((input_size,) * 3 if isinstance(input_size, int) else input_size)
        self.num_patches = int(np.prod(self.size))

    def get_shape(self) -> Size3:
        return self.size

    def __call__(self, num_masking_patches: int = 0) -> np.ndarray:
        """[h, w, d] bool, True = masked."""
        mask = np.zeros(self.num_patches, dtype=bool)
        mask[random.sample(range(self.num_patches), num_masking_patches)] = True
        return mask.reshape(self.size)
