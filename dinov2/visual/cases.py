"""Volumes in three planes, with outlines of what is labelled."""

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
