"""Volumes in three planes: with outlines of what is labelled, or above their patches in colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dinov2.geometry import Spacing
from dinov2.visual.figures import save


@matplotlib.rc_context({"text.parse_math": False})
def draw_case(
    channels: np.ndarray,
    masks: dict[str, np.ndarray],
    spacing_mm: Spacing,
    path: Path,
    title: str = "",
    centre: Sequence[int] | None = None,
) -> None:
    """Each channel in three planes, the outlines of masks over it.

    Args:
        channels: [C, H, W, D] in [-1, 1].
        masks: [H, W, D] bool each, by the names of the legend.
        spacing_mm: Along H, W, D: the planes have their true proportions.
        path: PNG.
        title: Above it.
        centre: Voxel in which the planes meet; None: those with most of the masks (`busiest`).
    """
    centre = busiest(list(masks.values()), channels.shape[1:]) if centre is None else centre
    colours = [matplotlib.colormaps["tab20" if len(masks) > 10 else "tab10"](i % 20) for i in range(len(masks))]
    figure = Figure(figsize=(9, 3.1 * len(channels) + 0.5 + 0.3 * bool(title)), layout="constrained", facecolor="black")
    grid = figure.subplots(len(channels), 3, squeeze=False)
    for row, channel in zip(grid, channels, strict=True):
        for axis_index, axis in enumerate(row):
            across = [s for i, s in enumerate(spacing_mm) if i != axis_index]
            plane = channel.take(centre[axis_index], axis_index).T
            axis.imshow(plane, cmap="gray", vmin=-1, vmax=1, origin="lower", aspect=across[1] / across[0])
            for mask, colour in zip(masks.values(), colours, strict=True):
                outline = mask.take(centre[axis_index], axis_index).T
                if outline.any():
                    axis.contour(outline, levels=[0.5], colors=[colour], linewidths=1)
            axis.set_axis_off()
    named = [(name, colour) for (name, mask), colour in zip(masks.items(), colours, strict=True) if mask.any()]
    handles = [figure.gca().plot([], [], color=colour, label=name)[0] for name, colour in named]
    if handles:
        columns = min(len(handles), 7)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, labelcolor="white", frameon=False)
    if title:
        figure.suptitle(title, color="white", fontsize=11)
    save(figure, path, 100, "black")


def busiest(masks: Sequence[np.ndarray], shape: tuple[int, ...]) -> list[int]:
    """The plane across each axis with the most labelled voxels; the middle one without any."""
    labelled = np.any(masks, axis=0) if masks else np.zeros(shape, bool)
    if not labelled.any():
        return [n // 2 for n in shape]
    return [int(labelled.sum(tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3)]


def pca_colours(features: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The first three principal components of the masked features, stretched to [0, 1] each.

    Args:
        features: [h, w, d, E].
        mask: [h, w, d] bool; the components are those of its cells, outside is black.

    Returns:
        [h, w, d, 3] float32.
    """
    cells = features[mask].astype(np.float64)
    centred = cells - cells.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    scores = centred @ vectors[:, -3:][:, ::-1]
    low, high = np.quantile(scores[:: max(1, len(scores) // 100_000)], [0.02, 0.98], axis=0)
    out = np.zeros((*mask.shape, 3), np.float32)
    out[mask] = ((scores - low) / np.maximum(high - low, 1e-9)).clip(0, 1)
    return out


def draw_patches(volume: np.ndarray, maps: dict[str, np.ndarray], step: int, path: Path) -> None:
    """Three mid-slices of a volume, and beneath them its patches coloured by each network's features.

    Args:
        volume: [H, W, D] in [-1, 1].
        maps: Colours [h, w, d, 3] by name; a cell covers `step` voxels.
    """
    rows = {"volume": volume, **maps}
    figure = Figure(figsize=(9, 2.9 * len(rows)), layout="constrained", facecolor="black")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for row, (name, image) in zip(axes, rows.items(), strict=True):
        for axis_index, axis in enumerate(row):
            middle = volume.shape[axis_index] // 2
            at = middle if name == "volume" else min(middle // step, image.shape[axis_index] - 1)
            plane = np.rot90(image.take(at, axis_index))
            shown = [n for i, n in enumerate(volume.shape) if i != axis_index]
            scale = 1 if name == "volume" else step
            axis.imshow(plane, cmap="gray", vmin=-1, vmax=1, extent=(0, plane.shape[1] * scale, 0, plane.shape[0] * scale))
            axis.set(xlim=(0, shown[0]), ylim=(0, shown[1]), xticks=[], yticks=[])
            axis.set_facecolor("black")
        row[0].set_ylabel(name, color="white", fontsize=12)
    save(figure, path, 100, "black")
