"""Scans for a frozen network: all channels of one person's scan, prepared as for pretraining, and where their voxels lie.

C channels, H W D as prepared, X Y Z as stored.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov2.data.corpus.domain import kind_of
from dinov2.data.datalist import Entry
from dinov2.data.preprocess import INT16_SCALE, PERCENTILES, foreground_box, normalise, slice_axis, to_16_bits, windowed
from dinov2.data.volumes.grids import GridMap
from dinov2.data.volumes.opening import RawVolume, check_same_grid, open_volume
from dinov2.errors import BadInput
from dinov2.files import user_path
from dinov2.geometry import Range, triple
from dinov2.models.backbone import Preparation

logger = logging.getLogger(__name__)

AS_OURS = Preparation()


@dataclass(frozen=True)
class Scan:
    """A prepared scan.

    Attributes:
        name: Path of its (first) file.
        voxels: [C, H, W, D] int16, value * 32767, slice axis last, cropped to the foreground of all channels together.
        affine: [4, 4] prepared voxel -> mm (RAS+); of a format without one, the spacing.
        modality, organ: As its list says; None where it does not.
    """

    name: str
    voxels: np.ndarray
    affine: np.ndarray
    modality: str | None = None
    organ: str | None = None

    @property
    def data(self) -> Tensor:
        """[C, H, W, D] float32 in [-1, 1]."""
        return torch.from_numpy(self.voxels).float() * INT16_SCALE


def load_scan(
    files: Sequence[str | Path | Entry], percentiles: Range = PERCENTILES, preparation: Preparation = AS_OURS
) -> Scan:
    """One scan from a file, or from a file for each of its channels.

    A file with channels of its own gives all of them, unless its entry names one. Of a time axis the first point is taken. A
    scan of one channel is the same as pretraining's.

    Args:
        files: Paths, or entries of a datalist, which can say what a fourth axis is.
        percentiles: Of each channel, that become -1 and 1.
        preparation: What a network of others wants instead.

    Raises:
        BadVolume: A file cannot be used, or the channels do not lie on one grid.
    """
    raws = [raw for file in files for raw in _channels(file)]
    first = raws[0]
    for other in raws[1:]:
        check_same_grid(first, other, f"{other.path}: with {first.path} as another channel")
    images, affine = [_normalised(raw, percentiles, preparation.window) for raw in raws], first.affine
    axis = slice_axis(first.spacing_mm)
    if preparation.orientation is not None:
        grid = GridMap(triple(images[0].shape), affine, preparation.orientation, None)
        images, affine, axis = [grid.prepare(image, linear=True) for image in images], grid.affine, 2
    image = np.stack([np.moveaxis(image, axis, -1) for image in images])  # [C, H, W, D]
    box = foreground_box(image.max(axis=0))
    order = [a for a in range(3) if a != axis] + [axis]
    affine = affine[:, [*order, 3]]
    affine[:3, 3] += affine[:3, :3] @ [b.start for b in box]
    kind = kind_of(files[0]) if isinstance(files[0], Entry) else (None, None)
    return Scan(first.path, to_16_bits(image[:, *box]), affine, *kind)


def _normalised(raw: RawVolume, percentiles: Range, window: Range | None) -> np.ndarray:
    voxels = raw.read()
    if window is not None:
        return windowed(voxels, raw.path, window, raw.padding(voxels))
    return normalise(voxels, raw.path, percentiles, raw.padding(voxels))


def _channels(file: str | Path | Entry) -> list[RawVolume]:
    entry = file if isinstance(file, Entry) else Entry(user_path(file), ())
    raw = open_volume(entry)
    if raw.num_times > 1:
        logger.info("%s: the first of its %d time points is taken", raw.path, raw.num_times)
    if raw.channel is None or entry.channel is not None:
        return [raw]
    return [dataclasses.replace(raw, channel=c) for c in range(raw.image.shape[3])]


def bare_volumes(item: Tensor | np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Values that do not come from a file: [B, C, H, W, D] float32 on the CPU, and a MetaTensor's affine.

    Args:
        item: [B, C, H, W, D], [C, H, W, D] or [H, W, D], slice axis last.

    Raises:
        BadInput: Another number of axes, an empty axis, or values that are not finite.
    """
    affine = getattr(item, "affine", None)
    values = item.as_tensor() if hasattr(item, "as_tensor") else torch.as_tensor(item)  # MONAI's class keeps to its operations
    if values.ndim not in (3, 4, 5) or 0 in values.shape:
        raise BadInput(f"shape {tuple(values.shape)}: expected [B, C, H, W, D], [C, H, W, D] or [H, W, D], none of them 0")
    values = values.detach().to("cpu", torch.float32)
    values = values[(None,) * (5 - values.ndim)]
    if not torch.isfinite(values).all():
        raise BadInput(f"shape {tuple(values.shape)}: values are not finite: replace NaN and infinity first")
    return values, None if affine is None else torch.as_tensor(affine).cpu()
