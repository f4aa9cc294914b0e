"""What a network makes of a scan, in three planes in millimetre aspect, beside the scan: colours, or heat above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinov2.geometry import Spacing, triple
from dinov2.visual.figures import STYLE, save

PLANES = ("sagittal", "coronal", "axial")
_SIDES = (("P", "A", "I", "S"), ("L", "R", "I", "S"), ("L", "R", "P", "A"))  # left, right, bottom, top of each plane
_HEAT = 0.85  # most of what lies below a heat map that it hides
_PLANE_INCHES = 1.9  # of the longest edge
_TITLE_INCHES = 0.27  # above each block
_GAP = 0.3  # between blocks


@dataclass(frozen=True)
class Panel:
    """One volume in three planes.

    Attributes:
        title: Above it.
        values: [X, Y, Z] as stored: grey, or heat above the scan; or colours [X, Y, Z, 3] in [0, 1].
        limits: Of heat: what is transparent, and what is full; None where it is no heat.
    """

    title: str
    values: np.ndarray
    limits: tuple[float, float] | None = None


def grey_levels(image: np.ndarray) -> np.ndarray:
    """Voxels stretched to [0, 1] by their 0.5 and 99.5 percentiles, float32; values that are not finite are 0."""
    finite = np.nan_to_num(image.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = np.percentile(finite, (0.5, 99.5))
    if not high > low:
        low, high = float(finite.min()), float(finite.max())
    return ((finite - low) / max(high - low, 1e-12)).clip(0, 1).astype(np.float32)


@matplotlib.rc_context(STYLE)
def draw_panels(
    image: np.ndarray,
    panels: Sequence[Panel],
    affine: np.ndarray,
    at_mm: Spacing,
    path: Path,
    marked: bool = False,
    columns: int | None = None,
) -> None:
    """The scan and its panels, three planes each, through one place.

    Planes are those of the voxel grid nearest to the anatomical ones, seen with the patient's left at the left.

    Args:
        image: [X, Y, Z] as stored, grey in [0, 1].
        panels: Drawn after it, in blocks of three planes.
        affine: [4, 4] voxel -> mm (RAS+).
        at_mm: Where the planes meet.
        path: PNG.
        marked: Draw a cross there.
        columns: Blocks in a row; None: more, the more there are.
    """
    blocks = [Panel("scan", image), *panels]
    columns = columns or min(len(blocks), 1 if len(blocks) <= 3 else 2 if len(blocks) <= 8 else 3)
    rows = -(-len(blocks) // columns)
    turn = nib.io_orientation(affine)
    straight = affine @ nib.orientations.inv_ornt_aff(turn, image.shape[:3])
    spacing = triple(np.linalg.norm(straight[:3, :3], axis=0).tolist())
    grey = _straight(image, turn)
    centre = np.linalg.solve(straight, [*at_mm, 1.0])[:3]
    index = [int(i) for i in np.rint(centre).clip(0, np.array(grey.shape) - 1)]
    size_mm = [n * s for n, s in zip(grey.shape, spacing, strict=True)]
    shapes = [(size_mm[1], size_mm[2]), (size_mm[0], size_mm[2]), (size_mm[0], size_mm[1])]  # width, height of each plane
    inch = _PLANE_INCHES / max(size_mm)
    widths, height = [w * inch for w, _ in shapes], max(h for _, h in shapes) * inch
    full = (columns * (sum(widths) + _GAP), rows * (height + _TITLE_INCHES) + 0.05)
    figure = Figure(figsize=full, facecolor="white")
    for number, block in enumerate(blocks):
        row, column = divmod(number, columns)
        values = _straight(block.values, turn)
        left, top = column * (sum(widths) + _GAP) + _GAP / 3, full[1] - row * (height + _TITLE_INCHES) - _TITLE_INCHES
        figure.text(left / full[0], (top + 0.05) / full[1], block.title, fontsize=9, va="bottom")
        for plane, (width, tall) in enumerate(shapes):
            box = (left, top - tall * inch, width * inch, tall * inch)
            axis = figure.add_axes((box[0] / full[0], box[1] / full[1], box[2] / full[0], box[3] / full[1]))
            left += (width * inch) + _GAP / 6
            _draw_plane(axis, grey, values, block, plane, index[plane], spacing)
            if number == 0:
                _name_sides(axis, plane)
            if marked:
                cross = [(centre[a] + 0.5) * spacing[a] for a in range(3) if a != plane]
                axis.plot(*cross, "+", color="#00e5ff", ms=9, mew=1.3)
    save(figure, path, 160)


def _straight(values: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Axes along R, A, S as nearly as flips and swaps make them."""
    return np.asarray(nib.orientations.apply_orientation(values, turn))


def _draw_plane(axis: Axes, grey: np.ndarray, values: np.ndarray, block: Panel, plane: int, at: int, spacing: Spacing) -> None:
    across = [s for a, s in enumerate(spacing) if a != plane]
    below, shown = grey.take(at, plane).T, values.take(at, plane).swapaxes(0, 1)  # rows upwards
    extent = (0, below.shape[1] * across[0], 0, below.shape[0] * across[1])
    where: dict[str, Any] = {"origin": "lower", "extent": extent, "aspect": "equal", "interpolation": "bilinear"}
    if block.limits is None and shown.ndim == 2:
        axis.imshow(shown, cmap="gray", vmin=0, vmax=1, **where)
    elif shown.ndim == 3:
        axis.imshow(shown, **where)
    else:
        low, high = block.limits or (0.0, 1.0)
        heat = ((shown - low) / (high - low)).clip(0, 1)
        axis.imshow(below, cmap="gray", vmin=0, vmax=1, **where)
        colours = matplotlib.colormaps["inferno"](heat)
        colours[..., 3] = _HEAT * np.sqrt(heat)
        axis.imshow(colours, **where)
    axis.set_axis_off()


def _name_sides(axis: Axes, plane: int) -> None:
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.02, "center", "bottom"),
              (0.5, 0.98, "center", "top"))  # fmt: skip
    for side, (x, y, horizontal, vertical) in zip(_SIDES[plane], places, strict=True):
        axis.text(x, y, side, transform=axis.transAxes, color="#00b8d4", fontsize=7, ha=horizontal, va=vertical)
