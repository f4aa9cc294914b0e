"""Confusion matrices side by side, in grey."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from dinov2.visual.figures.style import DOUBLE_MM, INK, PAPER, SMALLEST, letter, new_figure, notes_below, publish

MOST_NUMBERED = 9  # classes up to which a cell has room for its number
MOST_COLUMNS = 3


def draw_confusion(matrices: Mapping[str, np.ndarray], classes: Sequence[str], stem: Path, notes: Sequence[str] = ()) -> None:
    """A matrix for each series: the share of a row's cases (their true class) that is taken for each class.

    Args:
        matrices: [true, predicted] from 0 to 1 by name; a row of NaN is a class without a case, and is hatched.
        classes: Names.
        stem: Of PNG, PDF and CSV.
        notes: What it cannot show.
    """
    with matplotlib.rc_context(PAPER):
        columns = min(MOST_COLUMNS, max(1, len(matrices)))
        rows = math.ceil(max(1, len(matrices)) / columns)
        figure = new_figure(DOUBLE_MM * min(1, (columns + 0.3) / MOST_COLUMNS), 58 * rows + 6)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes[len(matrices) :]:
            axis.remove()
        image = None
        for place, (axis, (name, matrix)) in enumerate(zip(axes, matrices.items(), strict=False)):
            image = _matrix(axis, matrix, classes)
            axis.set_title(name)
            if len(matrices) > 1:
                letter(axis, place)
            if place % columns == 0:
                axis.set_ylabel("true class")
            if place + columns >= len(matrices):
                axis.set_xlabel("predicted class")
        if image is not None:
            bar = figure.colorbar(image, ax=axes[: len(matrices)], shrink=0.8, pad=0.02, aspect=30)
            bar.set_label("share of the true class")
            for spine in bar.ax.spines.values():
                spine.set_linewidth(0.4)
        notes_below(figure, notes)
    rows_of = [
        {"series": name, "true": true, "predicted": predicted, "share": float(matrix[i, j])}
        for name, matrix in matrices.items()
        for i, true in enumerate(classes)
        for j, predicted in enumerate(classes)
    ]
    publish(figure, stem, rows_of)


def _matrix(axis: Axes, matrix: np.ndarray, classes: Sequence[str]) -> matplotlib.image.AxesImage:
    image = axis.imshow(np.ma.masked_invalid(matrix), cmap="Greys", vmin=0, vmax=1)
    for i, row in enumerate(matrix):
        if np.isnan(row).any():
            axis.axhspan(i - 0.5, i + 0.5, facecolor="white", hatch="////", edgecolor="#bbbbbb", lw=0)
        elif len(classes) <= MOST_NUMBERED:
            for j, share in enumerate(row):
                colour = "white" if share > 0.5 else INK
                axis.text(j, i, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=SMALLEST)
    long = sum(map(len, classes)) > 22
    axis.set_xticks(
        range(len(classes)), classes, rotation=35 if long else 0, ha="right" if long else "center", rotation_mode="anchor"
    )
    axis.set_yticks(range(len(classes)), classes)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return image
