"""Training crops of a prepared case: where they lie, and how they are flipped, turned and changed in intensity.

Crops with label maps for a segmentation, views (one input of the network) for a classification.

C channels, s the crop's edges (voxels), of a classification a cube's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.data.augmentation import plan as ap
from dinov2.data.augmentation.fast import apply_intensity_
from dinov2.data.downstream.cases import Case
from dinov2.data.downstream.recipes import Recipe, Training
from dinov2.geometry import Edges, Size3, edges, triple

ROTATION, SCALE, SHIFT = 30.0, (0.8, 1.25), 0.1  # of a random affine map, for each axis: degrees, factor, share of the edge
BACKGROUND = -1.0  # of images; around what is smaller than a crop, and what a foreground is told from


def training_crops(case: Case, recipe: Recipe, image_size: Edges, rng: np.random.Generator) -> list[dict[str, Tensor]]:
    """Random crops of one case; a case smaller than a crop is padded around (`is_smaller` tells).

    Args:
        case: With a label.
        recipe: Its `train` says how.
        image_size: s, one number for a cube.
        rng: Stream of this draw, the only source of randomness (`dinov2/streams.py`).

    Returns:
        `train.crops_per_volume` times `image` [C, *s] float32 and `label` [1, *s] int16.

    Raises:
        BadInput: It has none.

    Source: 3DINO paper, Methods, "3DINO segmentation", and published settings, taken as facts (`configs/eval/datasets`).
    """
    plan, size = recipe.train, edges(image_size)
    image, label = case.image, case.truth
    if plan.foreground_crop:
        box = foreground_box(image)
        image, label = image[:, *box], label[:, *box]
    crops = []
    for _ in range(plan.crops_per_volume):
        start = _random_start(image, label, size, plan, rng)
        pair = [_cut(image, start, size, BACKGROUND), _cut(label, start, size, 0)]
        pair = _turn(pair, plan, rng)
        crops.append({"image": _change_intensity(pair[0], plan, rng), "label": pair[1].contiguous()})
    return crops


def is_smaller(case: Case, image_size: Edges) -> bool:
    """Whether crops of these edges reach beyond the case."""
    return any(n < edge for n, edge in zip(case.image.shape[1:], edges(image_size), strict=True))


def foreground_box(image: Tensor) -> tuple[slice, slice, slice]:
    """Bounding box of the voxels of [C, H, W, D] where any channel is above the lowest intensity; all where none is."""
    inside = (image > BACKGROUND).any(0)
    box = []
    for axis in range(3):
        along = inside.any(dim=[a for a in range(3) if a != axis]).nonzero().flatten().tolist()
        box.append(slice(along[0], along[-1] + 1) if along else slice(None))
    return triple(box)


def _random_start(image: Tensor, label: Tensor, size: Size3, plan: Training, rng: np.random.Generator) -> list[int]:
    """First voxel of a crop along each axis; below 0, by half of what is missing, where the volume is smaller."""
    shape = label.shape[1:]
    free = [n - edge for n, edge in zip(shape, size, strict=True)]
    if plan.crop == "random":
        return [int(rng.integers(f + 1)) if f > 0 else f // 2 for f in free]
    centre = _random_centre(image, label, rng)
    places = zip(centre, size, free, strict=True)
    return [min(max(c - edge // 2, 0), f) if f > 0 else f // 2 for c, edge, f in places]


def _random_centre(image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[int, ...]:
    """A labelled voxel or one of the background within the foreground, 1:1; where there is none of one kind, of the other."""
    labelled, background = label[0] > 0, label[0] == 0  # neither where it is ignored
    wanted = labelled if rng.random() < 0.5 else background & (image > BACKGROUND).any(0)
    found = (np.flatnonzero(mask.numpy()) for mask in (wanted, labelled, background, label[0] != 0))
    places = next(p for p in found if len(p))
    return tuple(int(i) for i in np.unravel_index(places[rng.integers(len(places))], labelled.shape))


def _cut(volume: Tensor, start: list[int], size: Size3, fill: float) -> Tensor:
    """[C, *s] from [C, H, W, D]; what lies outside is filled."""
    out = volume.new_full((len(volume), *size), fill)
    inside = [slice(max(a, 0), min(a + edge, n)) for a, edge, n in zip(start, size, volume.shape[1:], strict=True)]
    place = [slice(s.start - a, s.stop - a) for a, s in zip(start, inside, strict=True)]
    out[:, *place] = volume[:, *inside]
    return out


def _turn(pair: list[Tensor], plan: Training, rng: np.random.Generator) -> list[Tensor]:
    """The same flips and the same quarter turns for image and label."""
    flips = [1 + axis for axis in plan.flip_axes if rng.random() < plan.flip_p]
    turns = int(rng.integers(1, 4)) if rng.random() < plan.rot90_p else 0
    if turns % 2 and pair[0].shape[1] != pair[0].shape[2]:
        turns = 2  # a quarter would exchange the edges of a crop that is no square
    return [torch.rot90(volume.flip(flips), turns, (1, 2)) for volume in pair]


def _change_intensity(image: Tensor, plan: Training, rng: np.random.Generator) -> Tensor:
    """Scaled, then shifted, all channels alike."""
    scale = 1 + rng.uniform(-plan.scale, plan.scale) if rng.random() < plan.scale_p else 1.0
    shift = rng.uniform(-plan.shift, plan.shift) if rng.random() < plan.shift_p else 0.0
    return image.contiguous() * scale + shift


def central_cube(image: Tensor, image_size: int) -> Tensor:
    """The middle of a classification's image, [C, H, W, D] -> [C, s, s, s]; a smaller one is padded around."""
    return _cut(image, [(n - image_size) // 2 for n in image.shape[1:]], edges(image_size), BACKGROUND)


def training_cube(image: Tensor, recipe: Recipe, image_size: int, rng: np.random.Generator) -> Tensor:
    """A random, augmented crop of a classification's image, [C, H, W, D] -> [C, s, s, s].

    Source: 3DINO paper, Methods, "3DINO classification"; parameter ranges are published settings, taken as facts.
    """
    plan = recipe.train
    free = [n - image_size for n in image.shape[1:]]
    start = [int(rng.integers(f + 1)) if f > 0 else f // 2 for f in free]
    (view,) = _turn([_cut(image, start, edges(image_size), BACKGROUND)], plan, rng)
    view = view.contiguous()
    if plan.one_of and rng.random() < plan.one_of_p:
        view = _one_of(view, plan.one_of[int(rng.integers(len(plan.one_of)))], rng)
    return _change_intensity(view, plan, rng)


def _one_of(view: Tensor, name: str, rng: np.random.Generator) -> Tensor:
    """One named change, all channels alike but for noise."""
    if name == "affine":
        return _affine(view, rng)
    if name == "noise":
        std = rng.uniform(0.0, ap.NOISE_STD)
        steps: list[ap.Intensity] = [ap.Noise(std, int(rng.integers(2**31))) for _ in view]
    else:
        plans: dict[str, Callable[[], ap.Intensity]] = {
            "gamma": lambda: ap.Gamma(rng.uniform(0.5, 2.0)),
            "smooth": lambda: ap.plan_smooth(rng),
            "sharpen": lambda: ap.plan_sharpen(rng),
        }
        steps = [plans[name]()] * len(view)
    return torch.cat([apply_intensity_(channel[None].contiguous(), step) for channel, step in zip(view, steps, strict=True)])


def _affine(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Turned about each axis, each axis of what comes out scaled, and shifted; what comes from outside is background.

    The map from out to in is scaled first, as MONAI's: right angles stay right.
    """
    angles = np.deg2rad(rng.uniform(-ROTATION, ROTATION, 3))
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = matrix @ turn
    matrix = matrix / rng.uniform(*SCALE, 3)  # a column for each axis of what comes out
    shift = rng.uniform(-2 * SHIFT, 2 * SHIFT, 3)  # the edge of the cube is 2 in grid_sample's coordinates
    theta = torch.from_numpy(np.column_stack([matrix, shift])).float()[None]
    grid = F.affine_grid(theta, [1, 1, *view.shape[1:]], align_corners=False)
    return F.grid_sample(view[None] - BACKGROUND, grid, align_corners=False)[0] + BACKGROUND
