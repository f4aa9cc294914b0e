"""Probabilities of single cases over the fractions of labels: a row a case, its image first, then bars by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from dinov2.visual.figures.style import DOUBLE_MM, PAPER, Look, legend, look, looks, new_figure, notes_below, publish


@dataclass(frozen=True)
class Chances:
    """Of one case.

    Attributes:
        case: Its name.
        truth: Its class.
        why: What it stands for.
        values: Probability by fraction (as written above its column), series and class.
        image: [rows, columns] of square pixels from 0 to 1; None: it is not there.
    """

    case: str
    truth: str
    why: str
    values: Mapping[str, Mapping[str, Mapping[str, float]]]
    image: np.ndarray | None = None


def draw_chances(
    cases: Sequence[Chances], classes: Sequence[str], series: Sequence[str], stem: Path, notes: Sequence[str] = ()
) -> None:
    """A figure of some cases; the true class is shaded and bold.

    Args:
        cases: A row each; all have the same fractions.
        classes: Along an axis.
        series: All, in the order of their looks.
        stem: Of PNG, PDF and CSV.
        notes: What it cannot show.
    """
    fractions = list(cases[0].values) if cases else []
    shown = {name: one for name, one in looks(series).items() if any(name in of for c in cases for of in c.values.values())}
    with matplotlib.rc_context(PAPER):
        figure = new_figure(DOUBLE_MM, 38 * max(1, len(cases)) + 12)
        for place, (case, part) in enumerate(
            zip(cases, figure.subfigures(max(1, len(cases)), 1, squeeze=False)[:, 0], strict=False)
        ):
            part.suptitle(f"{chr(ord('a') + place)}   {case.case}: {case.truth} ({case.why})", x=0.01, ha="left", weight="bold")
            picture, *line = part.subplots(1, 1 + len(fractions), width_ratios=[0.6] + [1] * len(fractions))
            picture.set_axis_off()
            if case.image is not None:
                picture.imshow(case.image, cmap="gray", vmin=0, vmax=1)
            for axis, fraction in zip(line, fractions, strict=True):
                _bars(axis, case, fraction, classes, shown)
                axis.set_title(fraction.replace("\n", " "))
                axis.tick_params(labelleft=axis is line[0])
            line[0].set_ylabel("probability")
        legend(figure, {name: look(list(series).index(name)) for name in shown}, "bar")
        notes_below(figure, notes)
    rows = [
        {
            "case": c.case,
            "true": c.truth,
            "why": c.why,
            "fraction": f.replace("\n", " "),
            "series": s,
            "class": k,
            "probability": p,
        }
        for c in cases
        for f, by_series in c.values.items()
        for s, by_class in by_series.items()
        for k, p in by_class.items()
    ]
    publish(figure, stem, rows)


def _bars(axis: Axes, case: Chances, fraction: str, classes: Sequence[str], shown: Mapping[str, Look]) -> None:
    width = 0.84 / max(1, len(shown))
    for i, (name, one) in enumerate(shown.items()):
        for place, label in enumerate(classes):
            value = case.values[fraction].get(name, {}).get(label)
            if value is not None and value == value:
                x = place + (i - (len(shown) - 1) / 2) * width
                axis.bar(x, value, width * 0.94, color=one.colour, hatch=one.hatch, edgecolor="white", lw=0)
    axis.set(ylim=(0, 1), xlim=(-0.5, len(classes) - 0.5))
    long = sum(map(len, classes)) > 20
    axis.set_xticks(
        range(len(classes)), classes, rotation=35 if long else 0, ha="right" if long else "center", rotation_mode="anchor"
    )
    if case.truth in classes:
        true = list(classes).index(case.truth)
        axis.axvspan(true - 0.5, true + 0.5, color="#eeeeee", lw=0, zorder=0)
        axis.get_xticklabels()[true].set_fontweight("bold")
