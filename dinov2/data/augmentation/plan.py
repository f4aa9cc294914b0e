"""What is done to one volume, decided: boxes, turns and intensity changes of every crop, as plain numbers.

Drawing a plan is apart from applying it (`augmentations.py`), so that one plan can be applied by different back ends.
Sizes and boxes are (H, W, D), slice axis last. Ranges without a source are MONAI's defaults for its random transforms.

Source: 3DINO paper, Methods, "3DINO".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dinov2.geometry import Range, Size3, triple

ASPECT_RATIO = (0.9, 1 / 0.9)
LOG_ASPECT_RATIO = tuple(math.log(r) for r in ASPECT_RATIO)
TURN_P = 0.3
SHARPEN_ALPHA = (10.0, 30.0)
NOISE_STD = 0.002  # largest
ROTATION_PLANES = ((0, 1), (1, 2), (0, 2))
HISTOGRAM_POINTS = 10


@dataclass(frozen=True)
class Box:
    """Half-open box in voxels, inside the volume, never empty."""

    start: Size3
    stop: Size3

    @property
    def size(self) -> Size3:
        return triple(b - a for a, b in zip(self.start, self.stop, strict=True))

    def shifted(self, by: Size3) -> Box:
        start, stop = (triple(x + o for x, o in zip(edge, by, strict=True)) for edge in (self.start, self.stop))
        return Box(start, stop)


@dataclass(frozen=True)
class Gamma:
    gamma: float


@dataclass(frozen=True)
class Noise:
    std: float
    seed: int


@dataclass(frozen=True)
class HistogramShift:
    """Piecewise-linear map of [min, max] onto itself through equally spaced points and these values (from 0 to 1)."""

    points: tuple[float, ...]


@dataclass(frozen=True)
class Smooth:
    """Gaussian, sigma in voxels of the crop."""

    sigma: tuple[float, float, float]


@dataclass(frozen=True)
class Sharpen:
    """blur1 + alpha * (blur1 - blur2(blur1)), sigmas in voxels of the crop."""

    sigma1: tuple[float, float, float]
    sigma2: tuple[float, float, float]
    alpha: float


@dataclass(frozen=True)
class Gibbs:
    """Frequencies beyond (1 - alpha) of the largest radius are cut."""

    alpha: float


Intensity = Gamma | Noise | HistogramShift | Smooth | Sharpen | Gibbs


@dataclass(frozen=True)
class CropPlan:
    """One crop: cut `box`, resize to `size` cubed, flip, rotate by quarter turns, then change intensities in order.

    With `angles` (radians about H, W, D in this order) the box is turned about its centre, as a cube of `size` voxels would be:
    its corners then read what lies beside the box.
    """

    box: Box
    size: int
    flips: tuple[int, ...]  # spatial axes
    rotations: tuple[tuple[tuple[int, int], int], ...]  # (plane, quarter turns)
    intensity: tuple[Intensity, ...]
    angles: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class SamplePlan:
    """All crops of one draw, boxes relative to the whole volume."""

    global_crops: tuple[CropPlan, ...]
    local_crops: tuple[CropPlan, ...]


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """The same number as `rng.uniform(low, high)`, without what numpy spends on arrays."""
    return low + (high - low) * rng.random()


def plan_crop(shape_hwd: Size3, in_slice_scale: Range, cross_slice_scale: Range, rng: np.random.Generator) -> Box:
    """Choose the box of one random crop: 2D RandomResizedCrop in-plane, an independent extent across slices.

    The box may be stretched across slices; the method intends it.

    Args:
        shape_hwd: Volume size (H, W, D) in voxels, slice axis last.
        in_slice_scale: Range of the in-plane area fraction, within (0, 1].
        cross_slice_scale: Range of the fraction of D, within (0, 1].
        rng: Stream of this sample, the only source of randomness.

    Returns:
        Box inside the volume, never empty.

    Source: 3DINO paper, Methods, "3DINO", on RandomResizedCrop.
    """
    height, width, depth = shape_hwd
    top, left, h, w = _in_slice_box(height, width, in_slice_scale, rng)
    d = max(1, round(depth * _uniform(rng, *cross_slice_scale)))
    front = int(rng.integers(depth - d + 1))
    return Box((top, left, front), (top + h, left + w, front + d))


def _in_slice_box(height: int, width: int, scale: Range, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, h, w): ten tries as torchvision's RandomResizedCrop, then the largest box whose aspect is allowed.

    That one lies at a random place too; in the middle, as torchvision's, it would never show the ends of a long slice.
    """
    for _ in range(10):
        area = height * width * _uniform(rng, *scale)
        aspect = math.exp(_uniform(rng, *LOG_ASPECT_RATIO))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        ratio = min(max(width / height, ASPECT_RATIO[0]), ASPECT_RATIO[1])
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w


def plan_region(shape_hwd: Size3, edges_vox: tuple[float, float, float] | None, rng: np.random.Generator) -> Box:
    """The part of the volume that all crops of a draw come from: a box of these edges at a random place, or all."""
    if edges_vox is None:
        return Box((0, 0, 0), shape_hwd)
    sizes = [min(n, max(1, round(edge))) for n, edge in zip(shape_hwd, edges_vox, strict=True)]
    start = triple(int(rng.integers(n - size + 1)) for n, size in zip(shape_hwd, sizes, strict=True))
    return Box(start, triple(a + size for a, size in zip(start, sizes, strict=True)))


def plan_turns(
    rng: np.random.Generator, turn_p: float = TURN_P
) -> tuple[tuple[int, ...], tuple[tuple[tuple[int, int], int], ...]]:
    """Flips (axes) and quarter turns ((plane, k), ...), each of the three with probability `turn_p`."""
    flips = tuple(axis for axis in range(3) if rng.random() < turn_p)
    rotations = tuple((plane, int(rng.integers(1, 4))) for plane in ROTATION_PLANES if rng.random() < turn_p)
    return flips, rotations


def plan_angles(rng: np.random.Generator, rotate_range: float = 0.0) -> tuple[float, float, float]:
    """Small angles (radians) about the three axes; a range of 0 draws nothing."""
    return tuple(rng.uniform(-rotate_range, rotate_range, 3).tolist()) if rotate_range else (0.0, 0.0, 0.0)


def _contrast(rng: np.random.Generator) -> list[Intensity]:
    """One of gamma, noise and histogram shift, applied with p = 0.8."""
    kind, applied = int(rng.integers(3)), rng.random() < 0.8
    if not applied:
        return []
    if kind == 0:
        return [Gamma(_uniform(rng, 0.5, 2.0))]
    if kind == 1:
        return [Noise(_uniform(rng, 0.0, NOISE_STD), int(rng.integers(2**31)))]
    points = np.linspace(0.0, 1.0, HISTOGRAM_POINTS).tolist()
    for i in range(1, HISTOGRAM_POINTS - 1):
        points[i] = _uniform(rng, points[i - 1], points[i + 1])
    return [HistogramShift(tuple(points))]


def plan_smooth(rng: np.random.Generator) -> Smooth:
    return Smooth(tuple(rng.uniform(0.25, 1.5, 3).tolist()))


def _smooth_or_sharpen(rng: np.random.Generator, sharpen_alpha: Range) -> Intensity:
    return plan_smooth(rng) if rng.random() < 0.5 else plan_sharpen(rng, sharpen_alpha)


def plan_sharpen(rng: np.random.Generator, alpha: Range = SHARPEN_ALPHA) -> Sharpen:
    sigma1 = rng.uniform(0.5, 1.0, 3)
    sigma2 = rng.uniform(0.5, sigma1)
    return Sharpen(tuple(sigma1.tolist()), tuple(sigma2.tolist()), _uniform(rng, *alpha))


def plan_intensity(
    crop_index: int, num_global: int, rng: np.random.Generator, sharpen_alpha: Range = SHARPEN_ALPHA
) -> tuple[Intensity, ...]:
    """Intensity changes by the crop's role: first global, second global, local."""
    steps = _contrast(rng)
    if crop_index == 0:
        steps.append(_smooth_or_sharpen(rng, sharpen_alpha))
    elif crop_index < num_global:
        if rng.random() < 0.1:
            steps.append(_smooth_or_sharpen(rng, sharpen_alpha))
        if rng.random() < 0.2:
            steps.append(Gibbs(rng.random()))
    elif rng.random() < 0.5:
        steps.append(plan_smooth(rng))
    return tuple(steps)
