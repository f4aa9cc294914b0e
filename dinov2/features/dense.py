"""Patch tokens closer together than the patches: the scan is shown again, moved by parts of a patch."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import torch

from dinov2.data.preprocess import INT16_SCALE
from dinov2.errors import BadInput
from dinov2.features.encoder import Encoder, Features
from dinov2.features.scans import Scan
from dinov2.features.spacing import resampled
from dinov2.features.views import View, grid_affine
from dinov2.geometry import triple


def dense_features(encoder: Encoder, scan: Scan, view: View, step: int) -> Features:
    """Features of a scan on a grid finer than its patches, B = 1.

    Args:
        encoder: The network.
        scan: As `encoder.load` gives it.
        view: How it is shown; windows or the whole.
        step: Distance of tokens (voxels), a divisor of the patch size p; (p / step)^3 times the work.

    Returns:
        `patch` [1, h, w, d, n * E] from the centre of the first patch to that of the last, every `step` voxels; `cls` of the
        scan as it is.

    Raises:
        BadInput: A step or view that cannot be.
    """
    scan, view = resampled(scan, view.spacing_mm), dataclasses.replace(view, spacing_mm=None)
    p = encoder.patch_size
    if step == p:
        return encoder.encode_scan(scan, view)
    if not 1 <= step <= p or p % step:
        raise BadInput(f"step {step}: must be a divisor of the network's patch size {p}")
    if view.mode == "resize":
        raise BadInput(f"step {step}: a resized scan has its patches side by side: leave it out, or show the whole or windows")
    grid = [-(-n // p) for n in scan.voxels.shape[1:]]
    missing = [(0, g * p - n) for g, n in zip(grid, scan.voxels.shape[1:], strict=True)]
    voxels = np.pad(scan.voxels, [(0, 0), *missing], constant_values=-round(1 / INT16_SCALE))
    affine = torch.from_numpy(scan.affine)
    fine = torch.zeros(0)
    first: Features | None = None
    for offset in product(*(range(0, p if g > 1 else 1, step) for g in grid)):
        box = [slice(o, o + (g - (o > 0)) * p) for o, g in zip(offset, grid, strict=True)]
        moved = dataclasses.replace(scan, voxels=voxels[:, *box])
        found = encoder.encode_scan(moved, view)
        if first is None:
            first = found
            fine = found.patch.new_zeros(1, *((g - 1) * p // step + 1 for g in grid), found.patch.shape[-1])
        fine[:, *(slice(o // step, None, p // step) for o in offset)] = found.patch
    assert first is not None  # offset 0 is always there
    whole = triple([float(p)] * 3)
    return Features(first.cls, first.pooled, fine, grid_affine(affine, triple([float(step)] * 3), whole))
