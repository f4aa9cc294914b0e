"""Predictions beside the truth: one plane of each case, a column a method, the score above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from dinov2.geometry import Spacing
from dinov2.visual.figures.style import DOUBLE_MM, PAPER, SMALLEST, inches, new_figure, notes_below, publish, wrapped

IMAGE, TRUTH = "image", "truth"
CLASS_COLOURS = (
    "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2",  # Okabe and Ito's, on grey
    "#aa4499", "#88ccee", "#ddcc77", "#882255", "#44aa99", "#117733", "#999933", "#cc6677",
)  # fmt: skip
ALPHA = 0.55


@dataclass(frozen=True)
class Shown:
    """A row: a case, or one class of it.

    Attributes:
        label: Beside it.
        image: [H, W, D] in [-1, 1].
        spacing_mm: Along H, W, D.
        masks: [H, W, D] bool by class, by column (`TRUTH`, then methods); a column that is not there stays empty.
        scores: Above the columns, of the whole volume; NaN where none counts.
    """

    label: str
    image: np.ndarray
    spacing_mm: Spacing
    masks: Mapping[str, Mapping[str, np.ndarray]]
    scores: Mapping[str, float]

    @property
    def plane(self) -> int:
        """Across the last axis: the plane with most of the truth; of what was predicted where the truth is empty."""
        for masks in (self.masks.get(TRUTH, {}), *self.masks.values()):
            counts = sum((m.sum((0, 1)) for m in masks.values()), np.zeros(self.image.shape[2], int))
            if counts.any():
                return int(counts.argmax())
        return self.image.shape[2] // 2


def draw_planes(
    rows: Sequence[Shown], columns: Sequence[str], classes: Sequence[str], stem: Path, notes: Sequence[str] = ()
) -> None:
    """Image, truth, and each method's prediction; of cases, or of the classes of one case.

    Args:
        rows: In their order.
        columns: Methods.
        classes: All, in the order of their colours.
        stem: Of PNG, PDF and CSV.
        notes: What it cannot show.
    """
    heads = [IMAGE, TRUTH, *columns]
    edge_mm = (DOUBLE_MM - 12) / len(heads)
    heights = [min(1.6, max(0.5, _height(row))) for row in rows]
    colours = {name: CLASS_COLOURS[i % len(CLASS_COLOURS)] for i, name in enumerate(classes)}
    with matplotlib.rc_context(PAPER):
        titles = {head: wrapped(head, edge_mm, 6.5) for head in heads}
        lines = max(title.count("\n") for title in titles.values())
        figure = new_figure(DOUBLE_MM, sum(edge_mm * h + 5 for h in heights) + 12 + 3 * lines)
        grid = figure.subplots(len(rows), len(heads), squeeze=False, gridspec_kw={"height_ratios": heights})
        figure.set_layout_engine("constrained", w_pad=inches(0.4), h_pad=inches(0.4), wspace=0, hspace=0)
        for place, (axes, row) in enumerate(zip(grid, rows, strict=True)):
            for axis, head in zip(axes, heads, strict=True):
                _plane(axis, row, head, colours)
                score = _score(row, head)
                axis.set_title(
                    "\n".join([*([titles[head]] if place == 0 else []), score]).strip("\n") or " ", fontsize=6.5, pad=2
                )
            axes[0].set_ylabel(wrapped(row.label, edge_mm * heights[place] + 3, 6.5), fontsize=6.5)
        drawn = [name for name in classes if any(name in m for row in rows for m in row.masks.values())]
        handles = [Patch(facecolor=colours[name], label=name) for name in drawn]
        if len(handles) > 1:
            figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)), frameon=False)
        notes_below(figure, notes)
    table = [
        {"row": row.label.replace("\n", " "), "column": head, "plane": row.plane, "dice": row.scores.get(head, float("nan"))}
        for row in rows
        for head in columns
    ]
    publish(figure, stem, table)


def _height(row: Shown) -> float:
    """Of a plane over its width, in mm."""
    (h, w, _), (mm_h, mm_w, _) = row.image.shape, row.spacing_mm
    return (w * mm_w) / (h * mm_h)


def _score(row: Shown, head: str) -> str:
    if head in (IMAGE, TRUTH) or head not in row.masks:
        return ""
    score = row.scores.get(head, float("nan"))
    return "none" if score != score else f"{score:.2f}"


def _plane(axis: Axes, row: Shown, head: str, colours: Mapping[str, str]) -> None:
    at, (mm_h, mm_w, _) = row.plane, row.spacing_mm
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)
    aspect = mm_w / mm_h
    if head != IMAGE and head not in row.masks:
        axis.imshow(np.ones_like(row.image[:, :, at].T), cmap="gray", vmin=0, vmax=1, aspect=aspect)
        axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", va="center", fontsize=SMALLEST)
        return
    grey = np.repeat(((row.image[:, :, at].T + 1) / 2).clip(0, 1)[..., None], 3, -1)  # [W, H, 3]
    plane = grey.copy()
    masks = row.masks.get(head, {}) if head != IMAGE else {}
    for name in sorted(masks, key=lambda name: -int(masks[name].sum())):  # what is inside another region lies above it
        inside = masks[name][:, :, at].T
        plane[inside] = (1 - ALPHA) * grey[inside] + ALPHA * np.array(matplotlib.colors.to_rgb(colours[name]))
    axis.imshow(plane, origin="lower", aspect=aspect, interpolation="nearest")
