"""What a run sees, for TensorBoard, at its evaluation periods: crops with their masks, PCA of one volume by the teacher.

Nothing of the training depends on it: the teacher draws nothing, and every step begins from a seed of its own.

Shapes: S edge of a crop, P edge of a patch, N patches, E embedding.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.data import Datalist
from dinov2.data.cache.folder import VolumeCache
from dinov2.data.cache.store import load_volume
from dinov2.data.collate import Batch
from dinov2.data.preprocess import INT16_SCALE
from dinov2.errors import BadInput
from dinov2.features.pca import fit_basis
from dinov2.train.meta_arch import MetaArch

logger = logging.getLogger(__name__)

CUBE = 3  # times the edge of a global crop: what the PCA is of, so that its grid has some hundred patches
MOST_LOCAL = 4
EDGE = 192  # pixels and more, of a crop
GAP = 4  # pixels between two
MASKED = 0.35  # brightness of what a mask hides

Picture = np.ndarray  # [H, W, 3] in [0, 1]


def crops_picture(batch: Batch, patch_size: int) -> Picture:
    """The middle slices of a batch's first volume: global crops with what a mask hides darkened, then local ones."""
    crops, local, masks = (batch[f"collated_{name}"] for name in ("global_crops", "local_crops", "masks"))
    volumes = len(batch["sample_ids"])
    parts = []
    for i in range(0, len(crops), volumes):
        crop = crops[i, 0].float().cpu()  # [S, S, S]
        grid = crop.shape[0] // patch_size
        hidden = masks[i].cpu().view(grid, grid, grid).repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
        depth = crop.shape[2] // 2
        slice_ = _grey(crop[:, :, depth].numpy())
        parts.append(np.where(hidden[:, :, depth // patch_size].numpy()[..., None], MASKED * slice_, slice_))
    for i in range(0, min(len(local), MOST_LOCAL * volumes), volumes):
        crop = local[i, 0].float().cpu()
        parts.append(_grey(crop[:, :, crop.shape[2] // 2].numpy()))
    return side_by_side(parts)


def pca_picture(model: MetaArch, cube: Tensor, patch_size: int) -> Picture:
    """The middle planes of a volume, and beneath the colours of its patches by the teacher of now.

    Args:
        model: Whose teacher is whole in this process.
        cube: [1, 1, C, C, C].
        patch_size: P.

    Raises:
        BadInput: All patches look the same to it.
    """
    weight = next(model.teacher.parameters())
    # another size than that of training, for which nothing is to be compiled
    eager = nullcontext() if model.compile_state == "off" else torch.compiler.set_stance("force_eager")
    with eager:
        tokens = model.teacher_patches(cube.to(weight))[0].float().cpu().numpy()  # [N, E]
    grid = cube.shape[-1] // patch_size
    brightness = F.avg_pool3d(cube, patch_size).flatten().numpy()
    basis = fit_basis([tokens], [brightness])
    colours = basis.colours(basis.scores(tokens))[0].reshape(grid, grid, grid, 3)
    grey, middle = cube[0, 0].numpy(), cube.shape[-1] // 2
    planes = [_grey(grey.take(middle, axis)) for axis in range(3)]
    coloured = [np.kron(colours.take(grid // 2, axis), np.ones((patch_size, patch_size, 1))) for axis in range(3)]
    above, below = side_by_side(planes), side_by_side(coloured)
    return np.concatenate([above, np.ones((GAP, above.shape[1], 3)), below])


def fixed_cube(datalist: Datalist, edge: int, cache_dir: str) -> Tensor:
    """The first volume of a list, all of it in a cube [1, 1, C, C, C].

    Raises:
        BadInput: It cannot be used.
    """
    cache = VolumeCache(cache_dir, None) if cache_dir else None
    voxels = torch.from_numpy(np.array(load_volume(datalist.entries[0], 0, cache).stored)).float() * INT16_SCALE
    return F.interpolate(voxels[None], (edge,) * 3, mode="trilinear", align_corners=False)


class Pictures:
    """Draws at a run's evaluation periods; what cannot be drawn is said once.

    Args:
        datalist: Whose first volume is looked at.
        crop_size, patch_size: S and P.
        cache_dir: Of preprocessed volumes.
    """

    def __init__(self, datalist: Datalist, crop_size: int, patch_size: int, cache_dir: str) -> None:
        self._datalist, self._edge, self._patch_size, self._cache_dir = datalist, CUBE * crop_size, patch_size, cache_dir
        self._cube: Tensor | None = None
        self._has_failed = False

    def draw(self, model: MetaArch, batch: Batch, is_whole: bool) -> dict[str, Picture]:
        """By name; `is_whole` says that the teacher is not shared out among ranks."""
        drawn = {"crops": crops_picture(batch, self._patch_size)}
        if is_whole and not self._has_failed:
            try:
                if self._cube is None:
                    self._cube = fixed_cube(self._datalist, self._edge, self._cache_dir)
                drawn["pca"] = pca_picture(model, self._cube, self._patch_size)
            except (BadInput, OSError, torch.OutOfMemoryError) as err:  # no run ends for a picture
                self._has_failed = True
                logger.info("no picture of patches for TensorBoard: %s", " ".join(str(err).split()))
        return drawn


def side_by_side(parts: list[Picture]) -> Picture:
    """Square pictures in a row, each enlarged to about the same size; smaller ones keep whole pixels."""
    edge = max(EDGE, *(len(p) for p in parts))
    large = [np.kron(p, np.ones((max(1, edge // len(p)),) * 2 + (1,))) for p in parts]
    height = max(len(p) for p in large)
    padded = [np.pad(p, ((0, height - len(p)), (0, GAP), (0, 0)), constant_values=1.0) for p in large]
    return np.concatenate(padded, axis=1).astype(np.float32)


def _grey(plane: np.ndarray) -> Picture:
    """[-1, 1] -> [H, W, 3] in [0, 1]."""
    return np.repeat((plane.clip(-1, 1)[..., None] + 1) / 2, 3, axis=-1)
