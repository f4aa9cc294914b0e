"""Maps on a patch grid brought back to the file that the scan came from, voxel by voxel.

h w d patches, X Y Z voxels as stored.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from dinov2.features.scans import Scan
from dinov2.geometry import Size3


def on_stored_grid(
    values: np.ndarray, grid_affine: np.ndarray, scan: Scan, shape: Size3, affine: np.ndarray, smooth: bool = True
) -> np.ndarray:
    """Values of patches at every stored voxel, 0 outside of what the network saw.

    Args:
        values: [h, w, d], or [h, w, d, K].
        grid_affine: [4, 4] grid index -> mm.
        scan: Which box of the stored volume was prepared.
        shape: X, Y, Z of the file.
        affine: [4, 4] of the file.
        smooth: Linear between patch centres; else each voxel has its nearest patch's.

    Returns:
        [X, Y, Z] or [X, Y, Z, K] float32.
    """
    box = stored_box(scan, shape, affine)
    to_grid = np.linalg.solve(grid_affine, affine)  # stored voxel -> grid index: a permutation with steps
    axes = np.abs(to_grid[:3, :3]).argmax(1)  # the stored axis of each grid axis
    part = values.astype(np.float32)
    for grid_axis, axis in enumerate(axes):
        index = to_grid[grid_axis, axis] * np.arange(box[axis].start, box[axis].stop) + to_grid[grid_axis, 3]
        part = _sample(part, grid_axis, index, smooth)
    inverse = np.argsort(axes)  # of a permutation: which grid axis each stored one is
    part = part.transpose(*inverse, *range(3, part.ndim))
    out = np.zeros((*shape, *values.shape[3:]), np.float32)
    out[box] = part
    return out


def stored_box(scan: Scan, shape: Size3, affine: np.ndarray) -> tuple[slice, slice, slice]:
    """The stored voxels that are in the prepared scan."""
    to_stored = np.linalg.solve(affine, scan.affine)
    last = np.array([*(n - 1 for n in scan.voxels.shape[1:]), 1.0])
    ends = np.rint(np.stack([to_stored[:3, 3], (to_stored @ last)[:3]])).astype(int)
    one, two, three = (slice(max(0, int(ends[:, a].min())), min(n, int(ends[:, a].max()) + 1)) for a, n in enumerate(shape))
    return one, two, three


def _sample(values: np.ndarray, axis: int, index: np.ndarray, smooth: bool) -> np.ndarray:
    """Values along one axis at fractional indices, the outermost ones beyond the ends."""
    last = values.shape[axis] - 1
    index = index.clip(0, last)
    if not smooth:
        return values.take(np.rint(index).astype(int), axis)
    below = np.minimum(np.floor(index).astype(int), max(last - 1, 0))
    share = (index - below).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    return values.take(below, axis) * (1 - share) + values.take(np.minimum(below + 1, last), axis) * share


def brightness(scan: Scan, grid: Size3) -> np.ndarray:
    """[h, w, d] mean voxel of each cell of a grid over the scan, channels averaged, from -1 to 1."""
    return F.adaptive_avg_pool3d(scan.data.mean(0)[None, None], grid)[0, 0].numpy()


def at_most(values: np.ndarray, affine: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """A map of at most so many cells: averaged over equal shares of each axis where it has more.

    Args:
        values: [h, w, d, K].
        affine: [4, 4] grid index -> mm.

    Returns:
        The map, float32, and its affine.
    """
    grid = np.array(values.shape[:3])
    scale = (grid.prod() / most) ** (1 / 3)
    small = grid.copy()
    while small.prod() > most:
        small = np.maximum(1, np.floor(grid / scale)).astype(int)
        scale *= 1.01
    if (small == grid).all():
        return values.astype(np.float32), affine
    pooled = F.adaptive_avg_pool3d(torch.from_numpy(values.astype(np.float32)).movedim(-1, 0)[None], tuple(small.tolist()))
    step = np.diag([*(grid / small), 1.0])
    step[:3, 3] = (grid / small - 1) / 2
    return pooled[0].movedim(0, -1).numpy(), affine @ step
