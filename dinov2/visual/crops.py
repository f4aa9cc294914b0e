"""What a pretraining step is shown: crops of one volume, cubes as the network sees them, and which patches are hidden."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLUMNS = 4
HIDDEN = "#0072B2"  # over masked patches
_TILE_INCHES, _TITLE_INCHES, _DPI = 1.08, 0.2, 150


@dataclass(frozen=True)
class Crop:
    """One tile.

    Attributes:
        title: Above it.
        voxels: [s, s, s] in [-1, 1]; its middle plane across the last axis is drawn.
        mask: [g, g, g] bool, True = a patch that the student does not see; None: none.
    """

    title: str
    voxels: np.ndarray
    mask: np.ndarray | None = None


@matplotlib.rc_context({"font.size": 8, "text.parse_math": False})
def crops_png(crops: Sequence[Crop]) -> bytes:
    """PNG of tiles, four in a row; masked patches are covered."""
    rows = -(-len(crops) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * _TILE_INCHES, rows * (_TILE_INCHES + _TITLE_INCHES)), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis, crop in zip(axes, crops, strict=False):
        axis.imshow(shown_plane(crop), vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(crop.title, fontsize=7, pad=2)
    for axis in axes:
        axis.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def shown_plane(crop: Crop) -> np.ndarray:
    """[s, s, 3] from 0 to 1: the middle plane, rows upright, masked patches in one colour."""
    middle = crop.voxels.shape[2] // 2
    grey = ((np.nan_to_num(crop.voxels[:, :, middle], nan=-1.0) + 1) / 2).clip(0, 1)
    image = np.repeat(grey[..., None], 3, axis=2)
    if crop.mask is not None:
        patch = crop.voxels.shape[0] // crop.mask.shape[0]
        plane = crop.mask[:, :, min(middle // patch, crop.mask.shape[2] - 1)]
        hidden = plane.repeat(patch, 0).repeat(patch, 1)
        image[: hidden.shape[0], : hidden.shape[1]][hidden] = matplotlib.colors.to_rgb(HIDDEN)
    return np.rot90(image)
