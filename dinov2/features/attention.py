"""Where a frozen network looks: the attention of one token to all patches of a scan, each head.

Only the asked token's row is ever held, so that memory grows with the patches, not with their square.
Shapes: C channels, P class and register tokens, h w d patches, E embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2.distributed.precision import autocast
from dinov2.errors import BadInput, BadVolume
from dinov2.features.encoder import Encoder
from dinov2.features.scans import Scan
from dinov2.features.spacing import resampled
from dinov2.features.views import View, grid_affine, whole_patches, window_boxes
from dinov2.geometry import Size3, Spacing, triple
from dinov2.models.backbone import AttendingBackbone


class Attention(NamedTuple):
    """One token's attention; `maps` and `prefix` of a head sum to 1 together.

    Attributes:
        maps: [heads, h, w, d] to each patch.
        prefix: [heads, P] to the class token and registers.
        affine: [4, 4] grid index (a patch's centre) -> mm.
    """

    maps: Tensor
    prefix: Tensor
    affine: Tensor


@torch.no_grad()
def scan_attention(encoder: Encoder, scan: Scan, view: View, block: int = -1, at_mm: Spacing | None = None) -> Attention:
    """Attention of the class token, or of the patch at a place, in one block.

    Channels pass one by one and are averaged. With windows each has a class token of its own: maps are averaged where windows
    overlap and scaled to sum to 1 again; a patch attends within the windows that hold it.

    Args:
        encoder: Of a network that shows its attention.
        scan: As `encoder.load` gives it.
        view: How it is shown; `layers` means nothing here.
        block: Index, negative ones from the last.
        at_mm: Where the asking patch is, in the scan's world; None: the class token asks.

    Raises:
        BadInput: A network without attention, no such block, a place outside of the scan.
    """
    backbone = encoder.backbone
    if not isinstance(backbone, AttendingBackbone):
        raise BadInput("this network does not show its attention: choose pca or similarity, or a vision transformer")
    depth, p = backbone.num_layers, backbone.patch_size
    if not -depth <= block < depth:
        raise BadInput(f"layer {block}: the network has {depth}: choose 0 to {depth - 1}, or -1 for the last")
    scan = resampled(scan, view.spacing_mm)
    size = view.fitted(backbone)
    volumes, step = whole_patches(scan.data[:, None], view, size, p)  # [C, 1, H, W, D]
    affine = grid_affine(torch.from_numpy(scan.affine), step)
    grid = triple(n // p for n in volumes.shape[2:])
    asking = None if at_mm is None else cell_at(affine, grid, at_mm, scan)
    whole = [tuple(slice(0, n) for n in volumes.shape[2:])]
    boxes = window_boxes(volumes.shape[2:], size, p, view.overlap) if view.mode == "sliding_window" else whole
    total, count, prefix, used = torch.zeros(()), torch.zeros(grid), torch.zeros(()), 0
    for box in boxes:
        cells = tuple(slice(b.start // p, b.stop // p) for b in box)
        if asking is not None and not all(c.start <= a < c.stop for c, a in zip(cells, asking, strict=True)):
            continue
        row = _row(backbone, volumes[:, :, *box].to(encoder.device), cells, asking, block, encoder.dtype)  # [heads, P + N]
        if not used:
            total = torch.zeros(len(row), *grid)
        total[:, *cells] += row[:, backbone.num_prefix_tokens :].reshape(-1, *count[cells].shape)
        count[cells] += 1
        prefix = prefix + row[:, : backbone.num_prefix_tokens]
        used += 1
    maps, prefix = total / count.clamp_min(1), prefix / used
    maps *= ((1 - prefix.sum(1)) / maps.sum((1, 2, 3)))[:, None, None, None]
    if not maps.isfinite().all():
        raise BadVolume(f"{scan.name}: the network's attention is not finite: use fp32 as dtype", "non_finite_features")
    return Attention(maps, prefix, affine)


def _row(
    backbone: AttendingBackbone,
    volumes: Tensor,
    cells: tuple[slice, ...],
    asking: Size3 | None,
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    """[heads, P + N] float32 on the CPU: the asking token's attention in one window, mean over channels."""
    query = 0
    if asking is not None:
        h, w, d = (a - c.start for a, c in zip(asking, cells, strict=True))
        _, w_cells, d_cells = (c.stop - c.start for c in cells)
        query = backbone.num_prefix_tokens + (h * w_cells + w) * d_cells + d
    with autocast(volumes.device.type, dtype):
        rows = [backbone.get_self_attention(volume[None], block, [query])[0, :, 0] for volume in volumes]
    return torch.stack(rows).float().mean(0).cpu()


def cell_at(affine: Tensor, grid: Size3, at_mm: Spacing, scan: Scan) -> Size3:
    """The patch whose centre is nearest to a place in the world.

    Args:
        affine: [4, 4] grid index -> mm.
        grid: Patches along the axes.
        at_mm: x, y, z.
        scan: What the grid is of.

    Raises:
        BadInput: The place lies outside of the scan's foreground.
    """
    place = np.array([*at_mm, 1.0])
    last = np.array(scan.voxels.shape[1:]) - 1.0
    voxel = np.linalg.solve(scan.affine, place)[:3]
    if not ((voxel >= -0.5) & (voxel <= last + 0.5)).all():
        corners = (scan.affine @ [*c, 1.0] for c in (np.zeros(3), last))
        first, end = ("(" + ", ".join(f"{v:.0f}" for v in corner[:3]) + ")" for corner in corners)
        shown = ", ".join(f"{v:g}" for v in at_mm)
        raise BadInput(f"{scan.name}: ({shown}) mm lies outside of its foreground, which runs from {first} to {end} mm")
    index = np.linalg.solve(affine.numpy(), place)[:3]
    return triple(int(i) for i in np.rint(index).clip(0, np.array(grid) - 1))
