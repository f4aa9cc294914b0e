"""Multi-crop augmentation of one volume: draw a plan, apply it by one of two back ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dinov2.configs.schema import NUM_GLOBAL_CROPS
from dinov2.data.augmentation import plan as ap
from dinov2.geometry import pair, triple


class DataAugmentationDINO3d:
    """Two global and several local crops of a volume.

    Args:
        global_crops_in_slice_scale, global_crops_cross_slice_scale: Ranges of the in-plane area and of the share of
            slices of a global crop.
        local_crops_in_slice_scale, local_crops_cross_slice_scale: The same for local crops.
        local_crops_number: Local crops per volume.
        global_crops_size, local_crops_size: Edge of the resized crops (voxels).
        region_mm: Edge of the cube that all crops of one draw come from; None: the whole volume.
        region_vox: The same in voxels of each volume, instead.
        turn_p: Probability of each of the three flips and of each plane's quarter turns.
        rotate_range: Largest angle (radians) of each crop's own small rotation about each axis.
        sharpen_alpha: Range of the strength of sharpening.
        backend: `monai` (the reference), `fast` (one gather and few passes; compiled where possible), or `auto`: `fast`,
            because the tests hold it to the reference.
        dtype: Of the crops that a call returns; they are computed in float32.
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
        region_vox: float | None = None,
        turn_p: float = ap.TURN_P,
        rotate_range: float = 0.0,
        sharpen_alpha: ap.Range = ap.SHARPEN_ALPHA,
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        global_crop = (global_crops_size, pair(global_crops_in_slice_scale), pair(global_crops_cross_slice_scale))
        local_crop = (local_crops_size, pair(local_crops_in_slice_scale), pair(local_crops_cross_slice_scale))
        self.crop_kinds = [global_crop] * NUM_GLOBAL_CROPS + [local_crop] * local_crops_number
        self.region_mm, self.region_vox = region_mm, region_vox
        self.turn_p, self.rotate_range, self.sharpen_alpha = turn_p, rotate_range, pair(sharpen_alpha)
        self.apply_crop = backend_named(backend)
        self.dtype = dtype

    def plan(
        self, shape_hwd: ap.Size3, rng: np.random.Generator, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ) -> ap.SamplePlan:
        """Decide everything about the crops of one draw.

        Args:
            shape_hwd: Volume size in voxels, slice axis last.
            rng: Stream of the sample.
            spacing_mm: Along H, W, D; only `region_mm` needs it.
        """
        region = ap.plan_region(shape_hwd, self._region_edges_vox(spacing_mm), rng)
        crops = []
        for i, (size, in_slice, cross_slice) in enumerate(self.crop_kinds):
            box = ap.plan_crop(region.size, in_slice, cross_slice, rng).shifted(region.start)
            flips, rotations = ap.plan_turns(rng, self.turn_p)
            intensity = ap.plan_intensity(i, NUM_GLOBAL_CROPS, rng, self.sharpen_alpha)
            crops.append(ap.CropPlan(box, size, flips, rotations, intensity, ap.plan_angles(rng, self.rotate_range)))
        return ap.SamplePlan(tuple(crops[:NUM_GLOBAL_CROPS]), tuple(crops[NUM_GLOBAL_CROPS:]))

    def _region_edges_vox(self, spacing_mm: tuple[float, float, float]) -> tuple[float, float, float] | None:
        if self.region_vox is not None:
            return (self.region_vox,) * 3
        return None if self.region_mm is None else triple(self.region_mm / s for s in spacing_mm)

    def __call__(
        self,
        volume: Tensor,
        seed: int | np.random.Generator | None = None,
        spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> dict[str, list[Tensor]]:
        """Crops of a volume.

        Args:
            volume: [1, H, W, D] float32, or int16 (a preprocessed volume's voxels, value * 32767), slice axis last.
            seed: The only source of randomness; None, as DINOv2 calls it: torch's generator.
            spacing_mm: Along H, W, D.

        Returns:
            `global_crops`, `local_crops`: lists of [1, s, s, s].
        """
        crops = [torch.empty(1, size, size, size, dtype=self.dtype) for size, _, _ in self.crop_kinds]
        self.write(volume, crops, _seed_of_torch() if seed is None else seed, spacing_mm)
        global_crops, local_crops = crops[:NUM_GLOBAL_CROPS], crops[NUM_GLOBAL_CROPS:]
        return {"global_crops": global_crops, "local_crops": local_crops}

    def write(
        self,
        volume: Tensor,
        out: Sequence[Tensor],
        seed: int | np.random.Generator,
        spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        """The same crops, global before local, into memory that is there: [1, s, s, s] each, of any dtype."""
        plan = self.plan(triple(volume.shape[1:]), np.random.default_rng(seed), spacing_mm)
        for crop, place in zip((*plan.global_crops, *plan.local_crops), out, strict=True):
            place.copy_(self.apply_crop(volume, crop))


class RandomResizedCrop3d:
    """One random crop, resized to a cube, neither turned nor changed in intensity: what `DataAugmentationDINO3d` begins with.

    Args:
        size: Edge of the result (voxels).
        in_slice_scale: Range of the in-plane area fraction.
        cross_slice_scale: Range of the share of slices.
        backend: As of `DataAugmentationDINO3d`.
    """

    def __init__(self, size: int, in_slice_scale: ap.Range, cross_slice_scale: ap.Range, backend: str = "auto") -> None:
        self.size, self.in_slice_scale, self.cross_slice_scale = size, pair(in_slice_scale), pair(cross_slice_scale)
        self.apply_crop = backend_named(backend)

    def __call__(self, volume: Tensor, seed: int | np.random.Generator | None = None) -> Tensor:
        """[1, H, W, D], slice axis last -> [1, s, s, s]; without a seed from torch's generator."""
        rng = np.random.default_rng(_seed_of_torch() if seed is None else seed)
        box = ap.plan_crop(triple(volume.shape[1:]), self.in_slice_scale, self.cross_slice_scale, rng)
        return self.apply_crop(volume, ap.CropPlan(box, self.size, (), (), ()))


def _seed_of_torch() -> int:
    return int(torch.randint(2**63 - 1, ()))


def backend_named(name: str) -> Callable[[Tensor, ap.CropPlan], Tensor]:
    """The function that applies a crop's plan; MONAI is imported only where it is asked for.

    Raises:
        ValueError: Another name.
    """
    match name:
        case "auto" | "fast":
            from dinov2.data.augmentation import fast as apply_fast

            return apply_fast.apply_crop
        case "monai":
            from dinov2.data.augmentation import monai as apply_monai

            return apply_monai.apply_crop
    raise ValueError(f"augmentation {name!r} is not one of auto, monai, fast")
