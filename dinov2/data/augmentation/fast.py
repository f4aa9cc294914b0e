"""A crop plan applied in few passes: one gather for the whole geometry, intensity changes in place."""

from __future__ import annotations

from torch import Tensor

from dinov2.data.augmentation import plan as ap
from dinov2.data.preprocess import INT16_SCALE
from dinov2.geometry import triple
from dinov2.ops import augmentation as ops


def apply_crop(volume: Tensor, plan: ap.CropPlan) -> Tensor:
    """One crop, [1, H, W, D] int16 or float32 -> [1, s, s, s] float32."""
    source_axes, flipped = fold_turns(plan)
    scale = 1.0 if volume.is_floating_point() else INT16_SCALE
    x = ops.crop_resize(volume, plan.box.start, plan.box.stop, plan.size, source_axes, flipped, plan.angles, scale)
    for step in plan.intensity:
        apply_intensity_(x, step)
    return x


def fold_turns(plan: ap.CropPlan) -> tuple[ap.Size3, ap.Size3]:
    """Flips, then quarter turns, as one permutation: per axis of the result its source axis, and 1 where it runs backwards."""
    source_axes, flipped = [0, 1, 2], [0, 0, 0]
    for axis in plan.flips:
        flipped[axis] ^= 1
    for (a, b), turns in plan.rotations:
        for _ in range(turns):  # result[i, j] = input[j, n - 1 - i] in the plane (a, b)
            for values in (source_axes, flipped):
                values[a], values[b] = values[b], values[a]
            flipped[a] ^= 1
    return triple(source_axes), triple(flipped)


def apply_intensity_(x: Tensor, step: ap.Intensity) -> Tensor:
    """One planned intensity change of [1, s, s, s], in place."""
    match step:
        case ap.Gamma(gamma):
            return ops.adjust_gamma_(x, gamma)
        case ap.Noise(std, seed):
            return ops.add_gaussian_noise_(x, std, seed)
        case ap.HistogramShift(points):
            return ops.shift_histogram_(x, points)
        case ap.Smooth(sigma):
            return ops.gaussian_smooth_(x, sigma)
        case ap.Sharpen(sigma1, sigma2, alpha):
            return ops.gaussian_sharpen_(x, sigma1, sigma2, alpha)
        case ap.Gibbs(alpha):
            return ops.gibbs_(x, alpha)
    raise TypeError(f"unknown intensity step {step!r}")
