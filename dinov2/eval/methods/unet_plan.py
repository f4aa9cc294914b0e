"""The plan of a U-Net by nnU-Net's published rules: patch, kernels and strides from the spacings and sizes of a list.

The rules are those of nnU-Net v2's 3D full resolution: a patch that is a cube in millimetres, cut to the median case, as large
as the reference memory allows; every axis halved while 8 voxels are left, the coarser ones later, so that voxels become cubes.
Not nnU-Net's here: the spacing (the recipe's), batch, optimiser and budget (those of the other methods).

Source: Isensee et al. (2021), "nnU-Net", Methods and Supplementary Note 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dinov2.data.downstream.cases import prepared_grids
from dinov2.data.downstream.lists import Item
from dinov2.data.downstream.recipes import Recipe
from dinov2.errors import BadInput
from dinov2.geometry import Size3, Spacing, triple

START_VOXELS = 256**3  # of the first patch, before it is cut
SMALLEST_EDGE = 4  # voxels of the coarsest map
REFERENCE = 560_000_000  # numbers of all feature maps of a batch of two that 8 GB are said to hold
REFERENCE_BATCH = 2
WIDTH, WIDEST = 32, 320  # features at the full size and at most: of the memory's estimate
CONVOLUTIONS = 2  # of a stage, on the way down and up
MIN_STAGES, MAX_STAGES = 3, 16  # what DynUNet needs, and more than any patch gives


class UNetPlan(NamedTuple):
    """What a network is built by; travels with its weights.

    Attributes:
        strides: Of each stage, the first (1, 1, 1).
        kernels: Of each stage.
    """

    strides: list[Size3]
    kernels: list[Size3]

    @property
    def divisor(self) -> Size3:
        """What the edges of its input are multiples of."""
        return triple(math.prod(s[axis] for s in self.strides) for axis in range(3))

    def as_plain(self) -> dict[str, list[list[int]]]:
        """As JSON keeps it."""
        return {name: [list(stage) for stage in stages] for name, stages in self._asdict().items()}

    @classmethod
    def from_plain(cls, plain: Any) -> UNetPlan:
        """The reverse of `as_plain`.

        Raises:
            ValueError, TypeError, KeyError: It is none.
        """
        strides, kernels = ([triple(map(int, stage)) for stage in plain[name]] for name in cls._fields)
        sizes = {n for stage in (*strides, *kernels) for n in stage}
        if not (MIN_STAGES <= len(strides) == len(kernels) <= MAX_STAGES and sizes <= {1, 2, 3}):
            raise ValueError(f"no plan of a U-Net: {len(strides)} strides, {len(kernels)} kernels of {sorted(sizes)}")
        return cls(strides, kernels)


def plan_topology(spacing_mm: Spacing, patch: Size3) -> UNetPlan:
    """Strides and kernels of a patch.

    An axis is halved while 8 voxels of it are left and its spacing is below twice the finest one that can be halved (the last
    axis alone only above 12 voxels); a kernel is 1 along it until its spacing is below twice the finest one of all.
    """
    spacing, size = np.array(spacing_mm, float), np.array(patch)
    kernel = np.ones(3, int)
    kernels: list[Size3] = []
    strides: list[Size3] = [(1, 1, 1)]
    while True:
        large = size >= 2 * SMALLEST_EDGE
        if not large.any():
            break
        halved = large & (spacing / spacing[large].min() < 2)
        if halved.sum() == 1 and size[halved][0] < 3 * SMALLEST_EDGE:
            break
        kernel = np.where((kernel == 3) | (spacing / spacing.min() < 2), 3, 1)
        kernels.append(triple(int(k) for k in kernel))
        strides.append(triple(2 if h else 1 for h in halved))
        spacing, size = np.where(halved, 2 * spacing, spacing), np.where(halved, -(-size // 2), size)
    return UNetPlan(strides, [*kernels, (3, 3, 3)])


def plan_patch(spacing_mm: Spacing, shape: Size3, num_outputs: int) -> Size3:
    """The patch of a data set (voxels), whole in its own plan.

    Args:
        spacing_mm: Of the prepared cases.
        shape: Median of their sizes.
        num_outputs: Maps at the end.
    """
    per_mm = 1 / np.array(spacing_mm)
    cube = np.round(per_mm * (START_VOXELS / per_mm.prod()) ** (1 / 3))
    wanted = [int(min(c, n)) for c, n in zip(cube, shape, strict=True)]
    patch = _whole(spacing_mm, triple(wanted))
    while memory(plan_topology(spacing_mm, patch), patch, num_outputs) > REFERENCE:
        share = [p / n for p, n in zip(patch, shape, strict=True)]
        axis = share.index(
            max(share)
        )  # which covers most of a case; of equals the first, nnU-Net's last: it has the slices first
        smaller = list(patch)
        smaller[axis] -= plan_topology(spacing_mm, patch).divisor[axis]
        step = plan_topology(spacing_mm, triple(smaller)).divisor[axis]  # a coarser one would skip sizes
        patch = _whole(spacing_mm, triple(n - step if a == axis else n for a, n in enumerate(patch)))
    return patch


def _whole(spacing_mm: Spacing, patch: Size3) -> Size3:
    """Rounded up to multiples of what its plan divides by."""
    divisor = plan_topology(spacing_mm, patch).divisor
    return triple(-(-n // d) * d for n, d in zip(patch, divisor, strict=True))


def memory(plan: UNetPlan, patch: Size3, num_outputs: int) -> int:
    """Numbers in the feature maps of one pass: each convolution's, each transposed one's, and the outputs at every size."""
    size, voxels = np.array(patch), []
    for stride in plan.strides:
        size = size // np.array(stride)
        voxels.append(int(size.prod()))
    widths = [min(WIDTH * 2**i, WIDEST) for i in range(len(voxels))]
    down = sum(CONVOLUTIONS * w * v for w, v in zip(widths, voxels, strict=True))
    up = sum(((CONVOLUTIONS + 1) * w + num_outputs) * v for w, v in zip(widths[:-1], voxels[:-1], strict=True))
    return down + up


class Planned(NamedTuple):
    """A data set's plan and the patch that it is for."""

    plan: UNetPlan
    patch: Size3


def plan_unet(items: Sequence[Item], recipe: Recipe, resize_scale: float, edge: int | None = None) -> Planned:
    """Plan for the cases of a list, from their headers.

    Args:
        items: Of the whole training part, so that every fraction of it has the same network.
        recipe: Its spacing is the network's; where it has none, the median of the cases'.
        resize_scale: Divides the spacing.
        edge: Of a cube (voxels) that is asked for in place of a planned patch.

    Raises:
        BadInput: A case cannot be opened, or the patch is too small or does not divide.
    """
    grids = prepared_grids(items, recipe, resize_scale)
    spacing = triple(float(s) for s in np.median([g.spacing_mm for g in grids], axis=0))
    shape = triple(int(n) for n in np.median([g.shape for g in grids], axis=0))
    patch = plan_patch(spacing, shape, recipe.num_outputs) if edge is None else (edge, edge, edge)
    plan = plan_topology(spacing, patch)
    if len(plan.strides) < MIN_STAGES:
        raise BadInput(
            f"{recipe.name}: a U-Net needs a patch of 16 voxels along two axes at least, it is {' x '.join(map(str, patch))}: "
            "use a larger --image-size or --resize-scale"
        )
    return Planned(plan, patch)
