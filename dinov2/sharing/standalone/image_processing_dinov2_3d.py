"""Scans to what the network was trained on. This file needs numpy and transformers, and nibabel for files.

C channels, H W D as prepared (slice axis last), X Y Z as stored.
"""

from __future__ import annotations

import os
from typing import Any, TypedDict

import numpy as np
from transformers import BatchFeature, ImageProcessingMixin

from dinov2.data.preprocess import INT16_SCALE, foreground_box, normalise, slice_axis, to_16_bits

Paths = (str, os.PathLike)
Scan = Any  # a path, an array or tensor, a list of paths


class Options(TypedDict, total=False):
    """What `from_pretrained` may set otherwise than the folder says."""

    percentiles: list[float]
    patch_size: int
    do_normalize: bool
    do_crop: bool


class Dinov2Vit3dImageProcessor(ImageProcessingMixin):
    """Intensities by percentiles to [-1, 1], slice axis last, cropped to the foreground, padded with -1 to whole patches.

    Args:
        percentiles: Of each channel, that become -1 and 1.
        patch_size: Edge of a patch (voxels).
        do_normalize: False for values that are in [-1, 1] already.
        do_crop: Cut what is -1 in all channels off the borders.
    """

    valid_kwargs = Options
    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers' own way

    def __init__(
        self,
        percentiles: tuple[float, float] = (0.05, 99.95),
        patch_size: int = 16,
        do_normalize: bool = True,
        do_crop: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.percentiles = list(percentiles)
        self.patch_size = patch_size
        self.do_normalize = do_normalize
        self.do_crop = do_crop

    def __call__(
        self,
        images: Scan,
        spacing_mm: tuple[float, float, float] | None = None,
        return_affine: bool = False,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """One scan, or a list of scans.

        Args:
            images: A path that nibabel opens; an array or tensor [X, Y, Z] or [C, X, Y, Z]; a list of these, which is a
                batch, and in it a list of paths, which is one scan with a file for each channel.
            spacing_mm: Of arrays, along X, Y, Z: which axis runs across slices. None: the last one does.
            return_affine: Also give `affine` [B, 4, 4], prepared voxel -> mm (RAS+; of arrays by `spacing_mm`).
            return_tensors: `pt`, or None for NumPy.

        Returns:
            `pixel_values` [B, C, H, W, D] float32.

        Raises:
            ValueError: Nothing of the kind, a scan without contrast, or scans of different grids in one batch.
        """
        scans = list(images) if isinstance(images, (list, tuple)) else [images]
        if not scans:
            raise ValueError("no scan in the list: give at least one")
        prepared = [self._prepare(scan, spacing_mm) for scan in scans]
        shapes = sorted({values.shape for values, _ in prepared})
        if len(shapes) > 1:
            raise ValueError(f"scans of different shapes {shapes[:3]} do not make one batch: give them one at a time")
        data = {"pixel_values": np.stack([values for values, _ in prepared])}
        if return_affine:
            data["affine"] = np.stack([affine for _, affine in prepared])
        return BatchFeature(data=data, tensor_type=return_tensors)

    preprocess = __call__

    def _prepare(self, scan: Scan, spacing_mm: tuple[float, float, float] | None) -> tuple[np.ndarray, np.ndarray]:
        """One scan: [C, H, W, D] float32, and prepared voxel -> mm."""
        if isinstance(scan, Paths):
            channels, affine, name = *read(scan), os.fspath(scan)
        elif isinstance(scan, (list, tuple)) and scan and all(isinstance(file, Paths) for file in scan):
            parts = [read(file) for file in scan]
            if len({values.shape for values, _ in parts}) > 1:
                raise ValueError(f"{scan[0]}: its channels have different shapes: resample them to one grid")
            channels, affine, name = np.concatenate([values for values, _ in parts]), parts[0][1], os.fspath(scan[0])
        else:
            channels = np.array(scan, dtype=np.float32)
            name = f"array {channels.shape}"
            if channels.ndim not in (3, 4) or 0 in channels.shape:
                raise ValueError(f"{name}: expected a path, [X, Y, Z] or [C, X, Y, Z]")
            channels = channels[None] if channels.ndim == 3 else channels
            affine = np.diag([*(spacing_mm or (1.0, 1.0, 1.0)), 1.0])
        along_x, along_y, along_z = (float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))
        axis = slice_axis((along_x, along_y, along_z))
        image = np.stack([np.moveaxis(self._scaled(channel, name), axis, -1) for channel in channels])
        affine = affine[:, [*(a for a in range(3) if a != axis), axis, 3]]
        if self.do_crop and (image > -1).any():
            box = foreground_box(image.max(axis=0))
            image = image[(slice(None), *box)]
            affine[:3, 3] += affine[:3, :3] @ [b.start for b in box]
        values = to_16_bits(image).astype(np.float32) * np.float32(INT16_SCALE)  # as volumes are kept in training
        missing = [(0, -n % self.patch_size) for n in values.shape[1:]]
        return np.pad(values, [(0, 0), *missing], constant_values=-1.0), affine

    def _scaled(self, channel: np.ndarray, name: str) -> np.ndarray:
        if self.do_normalize:
            return normalise(channel, name, (self.percentiles[0], self.percentiles[1]))
        if not np.abs(channel).max() <= 1.001:
            raise ValueError(f"{name}: do_normalize=False is for values within -1 and 1")
        return np.clip(channel, -1.0, 1.0)


def read(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """The voxels [1, X, Y, Z] float32 of a file, of a time axis the first point, and its affine [4, 4]."""
    try:
        import nibabel
    except ImportError as err:
        raise ImportError(f"{path}: files are read by nibabel: pip install nibabel") from err
    image: Any = nibabel.load(path)
    shape, zooms = image.shape, image.header.get_zooms()
    while len(shape) > 3 and shape[-1] == 1:  # trailing axes of length 1 carry nothing
        shape = shape[:-1]
    if len(shape) not in (3, 4) or (len(shape) == 4 and not (len(zooms) > 3 and zooms[3] > 0)):
        raise ValueError(f"{path}: shape {image.shape}: expected 3 axes, or a time axis as the fourth")
    voxels = np.asanyarray(image.dataobj[(slice(None),) * 3 + (0,) * (len(image.shape) - 3)])
    return np.array(voxels, dtype=np.float32)[None], np.array(image.affine, dtype=np.float64)
