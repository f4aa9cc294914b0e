"""Figures of a cross-validated probe: ROC curves or predicted against true values, beside each model's score and interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinov2.visual.figures import STYLE, save

# Okabe and Ito's colours, told apart by the colour-blind; line styles tell them apart in grey print
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
PAPER: dict[Any, Any] = {**STYLE, "font.size": 8, "pdf.fonttype": 42, "text.parse_math": False}  # names are not formulae
Estimates = Mapping[str, tuple[float, Sequence[float] | None]]  # value and interval by model
_SIZE = (7.1, 2.9)  # inches: both columns of a page
_DPI = 300


def colour_of(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


@matplotlib.rc_context(PAPER)
def draw_roc(
    grid: np.ndarray, curves: Mapping[str, Mapping[str, np.ndarray]], scores: Estimates, chance: float, title: str, path: Path
) -> None:
    """A panel of curves for each class that is told from the rest, and the areas with their intervals.

    Args:
        grid: Shares of false alarms [g].
        curves: Sensitivity [g] by model, by class; of two classes the second alone.
        scores: Area of each model.
        chance: Where nothing is known.
        title: What is told from what.
        path: PNG; a PDF is written beside it.
    """
    most = 4  # panels in a row
    num_rows = -(-(len(curves) + 1) // most)
    figure = Figure(figsize=(max(_SIZE[0], 2.6 * min(most, len(curves) + 1)), _SIZE[1] * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, min(most, len(curves) + 1), squeeze=False).ravel()
    for axis, (name, by_model) in zip(axes, curves.items(), strict=False):
        for number, curve in enumerate(by_model.values()):
            axis.plot(grid, curve, color=colour_of(number), ls=LINES[number % len(LINES)], lw=1.6 if number == 0 else 1)
        axis.plot([0, 1], [0, 1], color="0.7", lw=0.8, zorder=0)
        axis.set(xlim=(-0.01, 1), ylim=(0, 1.01), xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
        axis.set_title(name, fontsize=8)
    draw_estimates(axes[len(curves)], scores, chance, "AUC (95 % interval)")
    for axis in axes[len(curves) + 1 :]:
        axis.set_axis_off()
    _finish(figure, title, path)


@matplotlib.rc_context(PAPER)
def draw_scatter(
    true: np.ndarray, predicted: np.ndarray, scores: Estimates, constant: float, title: str, what: str, path: Path
) -> None:
    """Predicted against true values, and each model's mean absolute error with its interval.

    Args:
        true: [n].
        predicted: [n], out of fold.
        scores: Mean absolute error of each model.
        constant: What always the same answer would be.
        title: Of the figure.
        what: The target's name.
        path: PNG; a PDF is written beside it.
    """
    figure = Figure(figsize=_SIZE, layout="constrained")
    left, right = figure.subplots(1, 2)
    low, high = min(true.min(), predicted.min()), max(true.max(), predicted.max())
    edge = 0.04 * (high - low)
    left.plot([low, high], [low, high], color="0.7", lw=0.8, zorder=0)
    left.axhline(constant, color="0.5", ls=":", lw=0.8, zorder=0)
    beside = {"textcoords": "offset points", "ha": "left", "va": "center", "annotation_clip": False}
    left.annotate("median", (high + edge, constant), (3, 0), color="0.4", fontsize=7, **beside)
    left.plot(true, predicted, "o", ms=3.5, mec="white", mew=0.4, color=COLOURS[0], alpha=0.9)
    limits = (low - edge, high + edge)
    left.set(xlabel=f"{what}, true", ylabel=f"{what}, predicted out of fold", xlim=limits, ylim=limits, aspect="equal")
    draw_estimates(right, scores, None, "mean absolute error (95 % interval)")
    _finish(figure, title, path)


def draw_estimates(axis: Axes, scores: Estimates, chance: float | None, label: str) -> None:
    """A dot with its interval for each model, from above, in the colours and lines of the curves."""
    for number, (value, interval) in enumerate(scores.values()):
        colour = colour_of(number)
        if interval is not None:
            axis.plot(interval, [number, number], color=colour, ls=LINES[number % len(LINES)], lw=1.4)
        axis.plot(value, number, "o", color=colour, ms=4.5)
        axis.annotate(f"{value:.2f}", (value, number), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    if chance is not None:
        axis.axvline(chance, color="0.7", lw=0.8, zorder=0)
    axis.set_yticks(range(len(scores)), [wrapped(name) for name in scores])
    axis.set_ylim(len(scores) - 0.4, -0.7)
    axis.set_xlabel(label)


def wrapped(name: str, width: int = 26) -> str:
    """A model's name in lines."""
    import textwrap

    return "\n".join(textwrap.wrap(name, width)) or name


def _finish(figure: Figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=9)
    for ending in (".png", ".pdf"):
        save(figure, path.with_suffix(ending), _DPI)
