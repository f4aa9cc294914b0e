"""A crop plan applied with MONAI's transforms: the reference that the fast back end is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

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
    Resample,
    Resize,
    Rotate90,
    SpatialCrop,
)
from scipy.spatial.transform import Rotation
from torch import Tensor

from dinov2.data.augmentation import plan as ap
from dinov2.data.preprocess import INT16_SCALE


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
    """One crop, [1, H, W, D] int16 or float32 -> [1, s, s, s] float32."""
    with _plain_tensors():
        x = _rotated(volume, plan) if any(plan.angles) else _resized(volume, plan)
        for axis in plan.flips:
            x = Flip(axis)(x)
        for plane, turns in plan.rotations:
            x = Rotate90(turns, plane)(x)
        for step in plan.intensity:
            x = apply_intensity(x, step)
    return x.contiguous()


def _resized(volume: Tensor, plan: ap.CropPlan) -> Tensor:
    x = SpatialCrop(roi_start=plan.box.start, roi_end=plan.box.stop)(volume)
    x = x.float() * INT16_SCALE if x.dtype == torch.int16 else x
    return Resize((plan.size,) * 3, mode="trilinear", align_corners=False)(x)


def _rotated(volume: Tensor, plan: ap.CropPlan) -> Tensor:
    """The turned box by MONAI's resampling of the whole volume, whose grid counts from the volume's middle."""
    x = volume.float() * INT16_SCALE if volume.dtype == torch.int16 else volume
    box, shape = plan.box, np.array(volume.shape[1:]).reshape(3, 1, 1, 1)
    about = (np.indices((plan.size,) * 3) - (plan.size - 1) / 2) / plan.size
    turn = Rotation.from_euler("xyz", plan.angles).as_matrix()
    middle = (np.add(box.start, box.stop) - 1).reshape(3, 1, 1, 1) / 2
    places = np.array(box.size).reshape(3, 1, 1, 1) * np.einsum("ij,jhwd->ihwd", turn, about) + middle
    grid = np.concatenate([places - (shape - 1) / 2, np.ones_like(places[:1])])
    return Resample(mode="bilinear", padding_mode="border", align_corners=False)(x, torch.from_numpy(grid))


def apply_intensity(x: Tensor, step: ap.Intensity) -> Tensor:
    """One planned intensity change of [1, s, s, s]."""
    return torch.as_tensor(_transform(step)(x))  # a tensor already; MONAI's transforms are declared to return arrays too


def _transform(step: ap.Intensity) -> Callable[[Tensor], np.ndarray | Tensor]:
    match step:
        case ap.Gamma(gamma):
            return AdjustContrast(gamma)
        case ap.Noise(std, seed):
            noise = RandGaussianNoise(prob=1.0, std=std, sample_std=False)
            noise.set_random_state(seed)
            return noise
        case ap.HistogramShift(points):
            return partial(_histogram_shift, points=points)
        case ap.Smooth(sigma):
            return GaussianSmooth(sigma)
        case ap.Sharpen(sigma1, sigma2, alpha):
            return GaussianSharpen(sigma1, sigma2, alpha)
        case ap.Gibbs(alpha):
            return GibbsNoise(alpha)
    raise TypeError(f"unknown intensity step {step!r}")


def _histogram_shift(x: Tensor, points: tuple[float, ...]) -> np.ndarray | Tensor:
    """MONAI's histogram shift with given control points (its transform only draws its own)."""
    low, high = x.min(), x.max()
    if low == high:
        return x
    values = torch.tensor(points, dtype=x.dtype)
    places = torch.linspace(0.0, 1.0, len(points), dtype=x.dtype)
    return RandHistogramShift(len(points)).interp(x, places * (high - low) + low, values * (high - low) + low)
