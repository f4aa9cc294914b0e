"""The views that Swin UNETR's pretraining tasks learn from: one cube of a volume, turned twice and corrupted twice.

A view is the cube turned by a multiple of 90 degrees in the plane of the first two axes; which multiple is one task. What the
network sees of it has boxes filled with noise and boxes filled with another volume of the batch; filling them in again is
another task, and telling that two views are of one cube is the third.

Source: Tang et al., "Self-supervised pre-training of Swin transformers for 3D medical image analysis", section 3; 3DINO paper,
"MONAI-ViT pretraining implementation details".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2.data.augmentation.plan import Box
from dinov2.data.cache.folder import VolumeCache
from dinov2.data.datalist import Datalist
from dinov2.data.dataset import Sample, Volumes
from dinov2.data.preprocess import INT16_SCALE
from dinov2.geometry import Size3, triple

NUM_VIEWS = 2
NUM_TURNS = 4
BOX_EDGES = (0.05, 0.25)  # of the cube's edge, from and below which those of a box are drawn
_BOXES_A_DRAW = 64
BACKGROUND = -1.0  # beside a volume that is smaller than the cube


@dataclass(frozen=True)
class CubePlan:
    """What the views of a position are of.

    Attributes:
        start: First voxel of the cube; negative where the volume is shorter, which then lies in its middle.
        turns: Quarter turns of each view.
        other: Which volume of the effective batch swapped boxes come from; its own place: nothing is swapped.
    """

    start: Size3
    turns: tuple[int, ...]
    other: int


@dataclass(frozen=True)
class Corruption:
    """Boxes of a view that are filled with noise (drawn from `seed`, box by box), then those that are swapped."""

    dropped: tuple[Box, ...]
    seed: int
    swapped: tuple[Box, ...]


def plan_cube(shape_hwd: Size3, size: int, effective_batch: int, rng: np.random.Generator) -> CubePlan:
    """Where a cube of `size` voxels lies, how its views are turned, and which other volume belongs to them."""
    start = triple(int(rng.integers(n - size + 1)) if n >= size else -((size - n) // 2) for n in shape_hwd)
    return CubePlan(start, tuple(rng.integers(NUM_TURNS, size=NUM_VIEWS).tolist()), int(rng.integers(effective_batch)))


def plan_corruption(size: int, max_share: float, rng: np.random.Generator) -> Corruption:
    """What a view loses: a share of it up to `max_share` to noise, and another one to the other volume."""
    dropped, seed = plan_boxes(size, max_share, rng), int(rng.integers(2**63))
    return Corruption(dropped, seed, plan_boxes(size, max_share, rng))


def plan_boxes(size: int, max_share: float, rng: np.random.Generator) -> tuple[Box, ...]:
    """Boxes anywhere in a cube until they add up to a share of it drawn from [0, `max_share`]; they may overlap."""
    wanted, boxes = rng.uniform(0, max_share) * size**3, []
    shortest = max(1, int(size * BOX_EDGES[0]))
    longest = max(shortest + 1, int(size * BOX_EDGES[1]))
    while wanted > 0:
        starts = rng.integers(max(1, size - shortest), size=(_BOXES_A_DRAW, 3))
        stops = np.minimum(starts + rng.integers(shortest, longest, size=starts.shape), size)
        before = np.cumsum([0, *np.prod(stops - starts, axis=1)])  # voxels before each, and all
        needed = int(np.count_nonzero(before[:-1] < wanted))
        boxes += [Box(triple(a), triple(b)) for a, b in zip(starts[:needed].tolist(), stops[:needed].tolist(), strict=True)]
        wanted -= float(before[needed])
    return tuple(boxes)


def cut_cube(voxels: Tensor, start: Size3, size: int) -> Tensor:
    """[1, H, W, D] int16 of a preprocessed volume -> [1, s, s, s] float32; background where there is no volume."""
    cube = torch.full((1, size, size, size), BACKGROUND)
    there, here = [slice(None)], [slice(None)]
    for first, n in zip(start, voxels.shape[1:], strict=True):
        here.append(slice(max(0, first), min(n, first + size)))
        there.append(slice(max(0, -first), max(0, -first) + here[-1].stop - here[-1].start))
    cube[tuple(there)] = voxels[tuple(here)].float() * INT16_SCALE
    return cube


def turned(cube: Tensor, turns: int) -> Tensor:
    """A cube [1, s, s, s] after quarter turns in the plane of its first two axes."""
    return torch.rot90(cube, turns, (1, 2))


def corrupted(view: Tensor, plan: Corruption, other: Tensor | None) -> Tensor:
    """What the network sees of a view: noise over the range of intensities, and boxes of another volume's view."""
    seen, rng = view.clone(), np.random.default_rng(plan.seed)
    for box in plan.dropped:
        noise = rng.standard_normal(box.size, np.float32)
        low, high = noise.min(), noise.max()
        if high > low:  # a box of one voxel becomes background
            noise = 2 * (noise - low) / (high - low) - 1
        else:
            noise[:] = BACKGROUND
        seen[_inside(box)] = torch.from_numpy(noise)
    if other is not None:
        for box in plan.swapped:
            seen[_inside(box)] = other[_inside(box)]
    return seen


def _inside(box: Box) -> tuple[slice, ...]:
    return (slice(None), *(slice(a, b) for a, b in zip(box.start, box.stop, strict=True)))


class SwinViews(Volumes):
    """Views by position, the same for any number of ranks and processes.

    Args:
        datalist: The volumes.
        size: Edge of the cube (voxels), at the volumes' own spacing.
        max_corrupted: Largest share of a view that is filled with noise, and that is swapped.
        effective_batch: Volumes of an update; swapped boxes come from another one of them.
        seed: Of order and views.
        store_bytes: Voxel bytes kept in memory.
        cache: Folder of preprocessed volumes on disk.
    """

    def __init__(
        self,
        datalist: Datalist,
        size: int,
        max_corrupted: float,
        effective_batch: int,
        seed: int,
        store_bytes: int,
        cache: VolumeCache | None = None,
    ) -> None:
        super().__init__(datalist, seed, store_bytes, cache)
        self.size, self.max_corrupted, self.effective_batch = size, max_corrupted, effective_batch

    def draw(self, position: int, out: Sequence[Tensor]) -> Sample:
        """Write the views of a position into `out`: both as they are, then both as the network sees them, [1, s, s, s] each.

        Returns:
            `sample_id`, `bad` {path: reason} and `rotations`, the quarter turns of each view; where no volume of the list can
            be used, only `bad`.
        """
        bad: dict[str, str] = {}
        own = self._views(position, bad)
        if own is None:
            return {"bad": bad}
        of_other = position - position % self.effective_batch + own.plan.other
        other = self._views(of_other, bad) if of_other != position else None
        for i, view in enumerate(own.views):
            corruption = plan_corruption(self.size, self.max_corrupted, own.rng)
            out[i].copy_(view)
            out[NUM_VIEWS + i].copy_(corrupted(view, corruption, other and other.views[i]))
        return {"sample_id": own.name, "bad": bad, "rotations": own.plan.turns}

    def _views(self, position: int, bad: dict[str, str]) -> _Views | None:
        """A position's turned cubes, before anything is done to them."""
        found = self.find(position, bad)
        if found is None:
            return None
        voxels = found.volume.voxels
        plan = plan_cube(triple(voxels.shape[1:]), self.size, self.effective_batch, found.rng)
        cube = cut_cube(voxels, plan.start, self.size)
        return _Views(found.name, plan, [turned(cube, turns) for turns in plan.turns], found.rng)


class _Views(NamedTuple):
    name: str
    plan: CubePlan
    views: list[Tensor]  # [1, s, s, s] each
    rng: np.random.Generator  # of the position, from here on
