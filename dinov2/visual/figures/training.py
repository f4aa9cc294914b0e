"""The course of online evaluation, and what the quick start found: bars of its read-out, places beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dinov2.visual.figures.style import INK, SOFT, STYLE, look, save

COLOURS = {
    "demo encoder": "tab:green",
    "untrained": "tab:orange",
    "voxels around": "tab:brown",
    "voxels": "tab:gray",
}


@matplotlib.rc_context(STYLE)
def draw_course(
    rows: Sequence[Mapping[str, float]],
    evaluations: Sequence[Mapping[str, float]],
    is_higher_better: Mapping[str, bool],
    prototypes: tuple[int, int],
    path: Path,
) -> None:
    """Losses, and below them what online evaluation measured, against the step, each with the untrained network's value.

    Args:
        rows: Lines of `training_metrics.json`.
        evaluations: Lines of `evaluation_metrics.json`.
        is_higher_better: Of each metric that is drawn.
        prototypes: K of the DINO and the iBOT head, for the lines at log K.
        path: PNG.
    """
    across = 3
    down = 1 + -(-len(is_higher_better) // across)
    figure = Figure(figsize=(9.5, 2.5 * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, squeeze=False)
    steps = [row["iteration"] + 1 for row in rows]
    losses = (("dino_cross_entropy", "DINO loss"), ("ibot_cross_entropy", "iBOT loss"))
    for axis, (name, title), k in zip(panels[0], losses, prototypes, strict=False):
        axis.plot(steps, [row[name] for row in rows], color=INK, lw=1)
        axis.axhline(math.log(k), color=SOFT, ls=":", lw=1)
        axis.set_title(f"{title}, nats (dotted: log K)")
    panels[0][2].plot(steps, [row["feature_rank"] for row in rows], color=INK, lw=1)
    panels[0][2].set_title("effective rank of class tokens")
    tasks = list(dict.fromkeys(name.rpartition("/")[0] for name in is_higher_better))
    for axis, name in zip(panels[1:].flat, is_higher_better, strict=False):
        task, _, metric = name.rpartition("/")
        measured = [(row["iteration"] + 1, row[name]) for row in evaluations if row.get(name) is not None]
        axis.plot(*zip(*measured, strict=True), color=look(tasks.index(task)).colour, marker="o", ms=2.5, lw=1)
        axis.axhline(measured[0][1], color=SOFT, ls="--", lw=1)
        axis.set_title(f"{task}\n{metric}, {'higher' if is_higher_better[name] else 'lower'} is better", fontsize=8)
    for axis in panels[1:].flat[len(is_higher_better) :]:
        axis.set_axis_off()
    figure.supxlabel("step (dashed: untrained)", fontsize=9)
    save(figure, path)


@matplotlib.rc_context(STYLE)
def draw_bars(scores: dict[int, dict[str, list[float]]], what: str, path: Path) -> None:
    """A panel of bars for each number of labelled volumes; a dot per held-out volume (and seed).

    Args:
        scores: Values by name, by number of volumes.
        what: Label of the axis.
        path: PNG.
    """
    figure = Figure(figsize=(3.9 * len(scores) + 1, 3.4), layout="constrained")
    axes = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axis, (count, by_name) in zip(axes, scores.items(), strict=True):
        for x, (name, values) in enumerate(by_name.items()):
            axis.bar(x, np.mean(values), color=COLOURS.get(name), alpha=0.8)
            axis.plot(x + np.linspace(-0.2, 0.2, len(values)), values, "k.", ms=3, alpha=0.6)
            axis.text(x, 0.01, f"{np.mean(values):.2f}", ha="center", color="white", weight="bold")
        axis.set_xticks(range(len(by_name)), list(by_name))
        axis.set_title(f"{count} labelled volume{'s' * (count > 1)}")
    axes[0].set_ylabel(what)
    save(figure, path)


@matplotlib.rc_context(STYLE)
def draw_found(rows: Sequence[Sequence[tuple[str, np.ndarray]]], path: Path) -> None:
    """A place a row: the plane that asks, and those that were found, a cross on each.

    Args:
        rows: Titles and planes [h, w, 3] from 0 to 1, of square pixels.
        path: PNG.
    """
    heights = [max(plane.shape[0] / plane.shape[1] for _, plane in row) for row in rows]
    figure = Figure(figsize=(2.4 * len(rows[0]), sum(2.3 * h + 0.35 for h in heights)), layout="constrained", facecolor="black")
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False, height_ratios=heights)
    for axes, row in zip(grid, rows, strict=True):
        for axis, (title, plane) in zip(axes, row, strict=True):
            axis.imshow(plane.clip(0, 1))
            axis.set_title(title, color="white", fontsize=9)
            axis.set_axis_off()
    save(figure, path, 110, "black")
