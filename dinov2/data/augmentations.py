"""Multi-crop augmentation of one volume: draw a plan, apply it with MONAI's transforms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from monai.data import get_track_meta, set_track_meta
from monai.transforms import (
    AdjustContrast,
    Flip,
    GaussianSharpen,
    GaussianSmooth,
    GibbsNoise,
    RandGaussianNoise,
    RandHistogramShift,
    Resize,
    Rotate90,
    SpatialCrop,
)
from torch import Tensor

from dinov2.data import augmentation_plan as ap

NUM_GLOBAL_CROPS = 2


class DataAugmentationDINO3d:
    """Two global and several local crops of a volume.

    Args:
        global_crops_in_slice_scale, global_crops_cross_slice_scale: Ranges of the in-plane area and of the share of
            slices of a global crop.
        local_crops_in_slice_scale, local_crops_cross_slice_scale: The same for local crops.
        local_crops_number: Local crops per volume.
        global_crops_size, local_crops_size: Edge of the resized crops (voxels).
        region_mm: Edge of the cube that all crops of one draw come from; None: the whole volume.
    """

    def __init__(
        self,
        global_crops_in_slice_scale: ap.Range = (0.48, 1.0),
        global_crops_cross_slice_scale: ap.Range = (0.5, 1.0),
        local_crops_in_slice_scale: ap.Range = (0.16, 0.48),
        local_crops_cross_slice_scale: ap.Range = (0.2, 0.5),
        local_crops_number: int = 8,
        global_crops_size: int = 96,
        local_crops_size: int = 48,
        region_mm: float | None = None,
    ) -> None:
        global_crop = (global_crops_size, tuple(global_crops_in_slice_scale), tuple(global_crops_cross_slice_scale))
        local_crop = (local_crops_size, tuple(local_crops_in_slice_scale), tuple(local_crops_cross_slice_scale))
        self.crop_kinds = [global_crop] * NUM_GLOBAL_CROPS + [local_crop] * local_crops_number
        self.region_mm = region_mm

    def plan(
        self, shape_hwd: ap.Size3, rng: np.random.Generator, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ) -> ap.SamplePlan:
        """Decide everything about the crops of one draw.

        Args:
            shape_hwd: Volume size in voxels, slice axis last.
            rng: Stream of the sample.
            spacing_mm: Along H, W, D; only `region_mm` needs it.
        """
        region = ap.plan_region(shape_hwd, spacing_mm, self.region_mm, rng)
        crops = []
        for i, (size, in_slice, cross_slice) in enumerate(self.crop_kinds):
            box = ap.plan_crop(region.size, in_slice, cross_slice, rng).shifted(region.start)
            flips, rotations = ap.plan_turns(rng)
            crops.append(ap.CropPlan(box, size, flips, rotations, ap.plan_intensity(i, NUM_GLOBAL_CROPS, rng)))
        return ap.SamplePlan(tuple(crops[:NUM_GLOBAL_CROPS]), tuple(crops[NUM_GLOBAL_CROPS:]))

    def __call__(
        self, volume: Tensor, seed: int | np.random.Generator, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ) -> dict[str, list[Tensor]]:
        """Crops of a volume.

        Args:
            volume: [1, H, W, D] float32, slice axis last.
            seed: The only source of randomness.
            spacing_mm: Along H, W, D.

        Returns:
            `global_crops`, `global_crops_teacher` (the same), `local_crops`: lists of [1, s, s, s] float32.
        """
        plan = self.plan(tuple(volume.shape[1:]), np.random.default_rng(seed), spacing_mm)
        with _plain_tensors():
            global_crops = [apply_crop(volume, c) for c in plan.global_crops]
            local_crops = [apply_crop(volume, c) for c in plan.local_crops]
        return {"global_crops": global_crops, "global_crops_teacher": global_crops, "local_crops": local_crops}


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """MONAI without its metadata tensors, which cost more than the work at small sizes."""
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


def apply_crop(volume: Tensor, plan: ap.CropPlan) -> Tensor:
    """One crop by MONAI's transforms, [1, H, W, D] -> [1, s, s, s] float32."""
    x = SpatialCrop(roi_start=plan.box.start, roi_end=plan.box.stop)(volume)
    x = Resize((plan.size,) * 3, mode="trilinear", align_corners=False)(x)
    for axis in plan.flips:
        x = Flip(axis)(x)
    for plane, turns in plan.rotations:
        x = Rotate90(turns, plane)(x)
    for step in plan.intensity:
        x = apply_intensity(x, step)
    return x.contiguous()


def apply_intensity(x: Tensor, step: ap.Intensity) -> Tensor:
    """One planned intensity change of [1, s, s, s]."""
    match step:
        case ap.Gamma(gamma):
            return AdjustContrast(gamma)(x)
        case ap.Noise(std, seed):
            return RandGaussianNoise(prob=1.0, std=std, sample_std=False).set_random_state(seed)(x)
        case ap.HistogramShift(points):
            return _histogram_shift(x, points)
        case ap.Smooth(sigma):
            return GaussianSmooth(sigma)(x)
        case ap.Sharpen(sigma1, sigma2, alpha):
            return GaussianSharpen(sigma1, sigma2, alpha)(x)
        case ap.Gibbs(alpha):
            return GibbsNoise(alpha)(x)
    raise TypeError(f"unknown intensity step {step!r}")


def _histogram_shift(x: Tensor, points: tuple[float, ...]) -> Tensor:
    """MONAI's histogram shift with given control points (its transform only draws its own)."""
    low, high = x.min(), x.max()
    if low == high:
        return x
    values = torch.tensor(points, dtype=x.dtype)
    places = torch.linspace(0.0, 1.0, len(points), dtype=x.dtype)
    return RandHistogramShift(len(points)).interp(x, places * (high - low) + low, values * (high - low) + low)
