"""Figures of counts and of a formula: what a corpus holds; where the deformable attention looks first."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from dinov2.visual.figures.style import (
    COLOURS,
    DOUBLE_MM,
    INK,
    MARKERS,
    PAPER,
    SOFT,
    legend,
    letter,
    look,
    new_figure,
    publish,
)


def draw_corpus(counts: Mapping[str, Mapping[str, int]], stem: Path) -> None:
    """Bars of a corpus: volumes of each organ, in colours and hatches by modality, on a logarithmic axis.

    Side by side, not stacked: on such an axis parts of a bar have no length.

    Args:
        counts: By organ, then modality.
        stem: Of PNG, PDF and CSV.
    """
    totals = {organ: sum(of.values()) for organ, of in counts.items()}
    organs = sorted(totals, key=lambda name: (-totals[name], name))
    of_all: dict[str, int] = {}
    for by_modality in counts.values():
        for name, n in by_modality.items():
            of_all[name] = of_all.get(name, 0) + n
    modalities = sorted(of_all, key=lambda name: (-of_all[name], name))
    shown = {f"{name} ({of_all[name]:,})": look(i) for i, name in enumerate(modalities)}
    with matplotlib.rc_context(PAPER):
        figure = new_figure(DOUBLE_MM, 66)
        axis = figure.subplots()
        for place, organ in enumerate(organs):
            own = [(i, counts[organ][name]) for i, name in enumerate(modalities) if counts[organ].get(name)]
            width = min(0.4, 0.84 / max(1, len(own)))
            for k, (i, n) in enumerate(own):
                x = place + (k - (len(own) - 1) / 2) * width
                one = look(i)
                axis.bar(x, n, width * 0.94, color=one.colour, hatch=one.hatch, edgecolor="white", lw=0)
                axis.text(x, n * 1.12, f"{n:,}", ha="center", va="bottom", rotation=90 if len(organs) > 6 else 0, fontsize=6)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
        axis.minorticks_off()
        if organs:
            axis.set_ylim(0.8, max(max(of.values()) for of in counts.values()) * 20)
        axis.set_xticks(range(len(organs)), organs, rotation=35, ha="right", rotation_mode="anchor")
        axis.set_xlim(-0.6, max(1, len(organs)) - 0.4)
        axis.set_ylabel("volumes")
        legend(figure, shown, "bar")
    publish(
        figure,
        stem,
        [{"organ": o, "modality": m, "volumes": counts[o][m]} for o in organs for m in modalities if counts[o].get(m)],
    )


PLANE = tuple(p for p in product((-1, 0, 1), repeat=2) if any(p))  # the 2D original: eight heads, 45 degrees apart


def draw_octants(offsets: np.ndarray, stem: Path) -> None:
    """First sampling offsets of the deformable attention: of the 2D original, and of this one, a head an octant.

    Args:
        offsets: [heads, points, 3] in voxels.
        stem: Of PNG, PDF and CSV.
    """
    points = offsets.shape[1]
    flat = np.array(PLANE)[:, None] * np.arange(1, points + 1)[None, :, None]  # [8, P, 2]
    with matplotlib.rc_context(PAPER):
        figure = new_figure(DOUBLE_MM * 0.8, 76)
        plane, space = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2, projection="3d")
        for head in range(len(offsets)):
            style: dict[str, Any] = {
                "color": COLOURS[head % len(COLOURS)],
                "marker": MARKERS[head],
                "ms": 4.5,
                "lw": 0.8,
                "markeredgecolor": INK,
            }
            style["markeredgewidth"] = 0.3
            plane.plot([0, *flat[head, :, 0]], [0, *flat[head, :, 1]], **style, label=f"head {head + 1}")
            x, y, z = (np.array([0, *offsets[head, :, i]]) for i in range(3))
            space.plot(x, y, z, **style)
        reach = np.abs(offsets).max() + 0.6
        plane.set(
            xlim=(-reach, reach),
            ylim=(-reach, reach),
            aspect="equal",
            xlabel="first axis (pixels)",
            ylabel="second axis (pixels)",
        )
        plane.axhline(0, color=SOFT, lw=0.4, zorder=0)
        plane.axvline(0, color=SOFT, lw=0.4, zorder=0)
        plane.set_title("2D: eight directions of a plane")
        _space(space, reach, points)
        letter(plane, 0)
        space.set_title("b", loc="left", weight="bold", fontsize=8)
        figure.legend(*plane.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False, handlelength=1.2)
    rows = [
        {"panel": name, "head": head + 1, "point": k + 1, **{f"axis_{i + 1}": float(v) for i, v in enumerate(place)}}
        for name, table in (("2D", np.concatenate([flat, np.full((*flat.shape[:2], 1), np.nan)], -1)), ("3D", offsets))
        for head, of_head in enumerate(table)
        for k, place in enumerate(of_head)
    ]
    publish(figure, stem, rows)


def _space(space: Any, reach: float, points: int) -> None:
    """The 3D panel: equal axes, the planes between octants."""
    ticks = [-points, 0, points]
    space.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach), xticks=ticks, yticks=ticks)
    space.set(
        zticks=ticks, xlabel="H (voxels)", ylabel="W (voxels)", zlabel="D (voxels)", title="3D: a head looks into each octant"
    )
    for a, b in ((0, 1), (0, 2), (1, 2)):
        edge = np.array([[-reach, -reach], [reach, -reach], [reach, reach], [-reach, reach], [-reach, -reach]])
        line = np.zeros((5, 3))
        line[:, a], line[:, b] = edge[:, 0], edge[:, 1]
        space.plot(*line.T, color=SOFT, lw=0.4)
    space.set_box_aspect((1, 1, 1), zoom=0.78)  # or a label is cut off
    space.view_init(elev=20, azim=-60)
