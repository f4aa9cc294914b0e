"""The batch of a training step: where its crops and masks lie in memory, and what else belongs to it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2.configs.schema import NUM_GLOBAL_CROPS
from dinov2.data.dataset import Sample
from dinov2.data.masking import plan_masks

# b volumes of a micro-batch, L local crops, G and S edges of global and local crops, N patches, M masked patches

Batch = dict[str, Any]

_ALIGNMENT = 64


class Rows(NamedTuple):
    """What of a batch has a row per crop, crop-major: all volumes' first crop, then all volumes' second, ..."""

    global_crops: Tensor  # [2b, 1, G, G, G]
    local_crops: Tensor  # [L*b, 1, S, S, S]
    masks: Tensor  # [2b, N] bool

    def crops_of(self, volume: int) -> list[Tensor]:
        """The crops of one volume, [1, s, s, s] each, global before local."""
        step = len(self.global_crops) // NUM_GLOBAL_CROPS
        return [*self.global_crops[volume::step], *self.local_crops[volume::step]]


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of a micro-batch lie in one piece of memory."""

    batch_size: int
    global_size: int
    local_size: int
    num_local: int
    num_patches: int
    dtype: torch.dtype = torch.float32  # of the crops

    @property
    def _parts(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        b, num_global = self.batch_size, NUM_GLOBAL_CROPS
        return [
            ((num_global * b, 1, *(self.global_size,) * 3), self.dtype),
            ((self.num_local * b, 1, *(self.local_size,) * 3), self.dtype),
            ((num_global * b, self.num_patches), torch.bool),
        ]

    @property
    def nbytes(self) -> int:
        return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in self._parts)

    def rows(self, memory: np.ndarray) -> Rows:
        """Views of `nbytes` bytes; they keep `memory` alive."""
        whole, first, views = torch.from_numpy(memory), 0, []
        for shape, dtype in self._parts:
            size = math.prod(shape) * dtype.itemsize
            views.append(whole[first : first + size].view(dtype).view(shape))
            first += _aligned(size)
        return Rows(*views)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Masking:
    """Masks of micro-batches: drawn for all 2B crops of an effective batch, of which each takes the rows of its volumes."""

    seed: int
    effective_batch: int
    sample_probability: float
    ratio_min_max: tuple[float, float]

    def write(self, positions: Sequence[int], masks: Tensor) -> int:
        """Fill `masks` [2b, N] for volumes of one step; returns how many patches could be masked at most."""
        step, first = divmod(positions[0], self.effective_batch)
        num_rows = NUM_GLOBAL_CROPS * self.effective_batch
        plan = plan_masks(self.seed, step, num_rows, masks.shape[1], self.sample_probability, self.ratio_min_max)
        volumes = np.arange(first, first + len(positions))
        rows = np.concatenate([volumes + crop * self.effective_batch for crop in range(NUM_GLOBAL_CROPS)])
        masks.copy_(torch.from_numpy(plan.masks[rows]))
        return int(plan.upper_bounds[rows].sum())


def collate(rows: Rows, positions: Sequence[int], samples: Sequence[Sample], upperbound: int) -> Batch:
    """The batch of rows that are written.

    Returns:
        `collated_global_crops` (2b, 1, G, G, G), `collated_local_crops` (L*b, 1, S, S, S), `collated_masks` (2b, N) bool,
        `mask_indices_list` (M,) into the flattened mask, `masks_weight` (M,) = 1 / masked patches of that row, `upperbound`
        int >= M, `n_masked_patches` (1,), `sample_ids`, `positions` (b,) int64, `bad` {path: reason}; of `SwinViews`
        `rotations` (2b,) int64; only `bad` where no volume could be used.
    """
    bad = {path: reason for s in samples for path, reason in s["bad"].items()}
    if not all("sample_id" in s for s in samples):
        return {"bad": bad}
    return {
        **_of_rows(rows, upperbound),
        "sample_ids": [s["sample_id"] for s in samples],
        "positions": torch.tensor(positions, dtype=torch.int64),
        "bad": bad,
        **_per_view(samples),
    }


def _per_view(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """What samples say of each of their views, view-major."""
    if "rotations" not in samples[0]:
        return {}
    return {"rotations": torch.tensor([s["rotations"] for s in samples], dtype=torch.int64).T.flatten()}


def _of_rows(rows: Rows, upperbound: int) -> Batch:
    """What DINOv2's collation gives: crops, masks, and where and how much the masked patches count."""
    masks = rows.masks
    return {
        "collated_global_crops": rows.global_crops,
        "collated_local_crops": rows.local_crops,
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
        "masks_weight": (1 / masks.sum(-1).clamp(min=1.0))[:, None].expand_as(masks)[masks],
        "upperbound": upperbound,
        "n_masked_patches": masks.sum().reshape(1),
    }


def collate_data_and_cast(
    samples_list: Sequence[Any],
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: Callable[[int], Any] | None = None,
) -> Batch:
    """DINOv2's collation, for torch's DataLoader; a run's own batches come from `TrainLoader`.

    Args:
        samples_list: What `DataAugmentationDINO3d` returns for each volume, or pairs of that and anything.
        mask_ratio_tuple: Lowest and highest share of masked patches.
        mask_probability: Share of the global crops that are masked.
        dtype: Of the crops.
        n_tokens: N, patches of a global crop.
        mask_generator: Number of patches to mask -> mask of N patches; None: uniform, as `MaskingGenerator3d`.

    Returns:
        As `collate`, without `sample_ids`, `positions` and `bad`. Masks follow Python's `random`.
    """
    if n_tokens is None:
        raise ValueError("collate_data_and_cast needs n_tokens, the patches of a global crop")
    crops = [s[0] if isinstance(s, (tuple, list)) else s for s in samples_list]
    global_crops, local_crops = (
        [c[kind][i].to(dtype) for i in range(len(crops[0][kind])) for c in crops] for kind in ("global_crops", "local_crops")
    )
    plan = plan_masks(random.getrandbits(63), 0, len(global_crops), n_tokens, mask_probability, mask_ratio_tuple)
    masks = plan.masks
    if mask_generator is not None:
        masks = np.stack([np.asarray(mask_generator(int(n)), dtype=bool).ravel() for n in masks.sum(1)])
    local = torch.stack(local_crops) if local_crops else global_crops[0].new_empty(0)
    return _of_rows(Rows(torch.stack(global_crops), local, torch.from_numpy(masks)), int(plan.upper_bounds.sum()))
