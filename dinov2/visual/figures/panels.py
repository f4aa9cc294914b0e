"""Means with intervals in panels: curves over the number of labels, bars with significance marks, dots of classes.

Which numbers, and how their intervals are made, whoever calls says. A number that is NaN is not drawn, and its row stays empty.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from dinov2.optional import needed_for
from dinov2.visual.figures.style import (
    DOUBLE_MM,
    INK,
    PAPER,
    SINGLE_MM,
    SMALLEST,
    Look,
    legend,
    letter,
    look,
    looks,
    new_figure,
    notes_below,
    publish,
)

NAN = math.nan
STARS = "* p < 0.05, ** p < 0.01, *** p < 0.001, **** p < 0.0001, ns: not significant"
BAR_WIDTH, WIDEST = 0.84, 0.28  # of a group of bars, of one bar
ANY_OFFSET = 0.03  # of a series beside its neighbour on a logarithmic axis


@dataclass(frozen=True)
class Value:
    """A mean and its interval; NaN where there is none.

    Attributes:
        series: Whose, as a method.
        place: Where along the axis, as it is written there.
        mean: The height.
        low: Of its interval.
        high: Of its interval.
        n: Values that it is the mean of.
        at: Number of the place on a curve's axis.
    """

    series: str
    place: str
    mean: float
    low: float = NAN
    high: float = NAN
    n: int = 0
    at: float = NAN


@dataclass(frozen=True)
class Test:
    """Of two series at a place.

    Attributes:
        p: What the stars say; NaN: no test.
        raw: Not corrected.
    """

    __test__ = False  # no class of pytest's

    place: str
    series: str
    against: str
    p: float
    raw: float = NAN


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        label: Of the axis of values.
        values: In the order of places.
        tests: Marked above bars.
        title: Above it.
        axis: Label of the other axis.
        largest: That a value can have, for the ticks; None: no bound.
    """

    label: str
    values: Sequence[Value]
    tests: Sequence[Test] = ()
    title: str = ""
    axis: str = ""
    largest: float | None = None


def draw_efficiency(
    panels: Sequence[Panel], series: Sequence[str], stem: Path, notes: Sequence[str] = (), columns: int = 2
) -> None:
    """Curves over the share of labels, on a logarithmic axis; a small sideways step keeps intervals apart.

    Args:
        panels: Drawn in rows of `columns`.
        series: All, in the order of their looks.
        stem: Of PNG, PDF and CSV.
        notes: What it cannot show.
        columns: Of panels.
    """
    with matplotlib.rc_context(PAPER):
        figure, axes = _grid(panels, columns, 56)
        for axis, panel in zip(axes, panels, strict=True):
            _curves(axis, panel, looks(series))
        legend(figure, _present(panels, series), "line")
        notes_below(figure, notes)
    publish(figure, stem, _rows(panels))


def _curves(axis: Axes, panel: Panel, shown: dict[str, Look]) -> None:
    drawn = [name for name in shown if any(v.series == name for v in panel.values)]
    for i, name in enumerate(drawn):
        own = sorted((v for v in panel.values if v.series == name and v.mean == v.mean), key=lambda v: v.at)
        if not own:
            continue
        one, aside = shown[name], 1 + ANY_OFFSET * (i - (len(drawn) - 1) / 2)
        x = np.array([v.at for v in own]) * aside
        axis.errorbar(
            x, [v.mean for v in own], yerr=_reach(own), color=one.colour, marker=one.marker, ls=one.dash, capsize=1.5,
            elinewidth=0.7, capthick=0.7, markeredgewidth=0, zorder=3 + len(drawn) - i,
        )  # fmt: skip
    places = {v.at: v.place for v in sorted(panel.values, key=lambda v: v.at)}
    axis.set_xscale("log")
    axis.set_xticks(list(places), list(places.values()))
    axis.minorticks_off()
    if places:
        axis.set_xlim(min(places) * 0.82, max(places) * 1.22)
    axis.set(xlabel=panel.axis, ylabel=panel.label, title=panel.title)
    axis.grid(axis="y", lw=0.3, color="#cccccc")
    axis.set_axisbelow(True)


def _reach(values: Sequence[Value]) -> np.ndarray | None:
    """[2, n] below and above the means; None where no interval is known. An interval need not hold its mean."""
    reach = np.array([[v.mean - v.low for v in values], [v.high - v.mean for v in values]])
    return np.maximum(np.nan_to_num(reach), 0) if np.isfinite(reach).any() else None


def draw_significance(
    panels: Sequence[Panel], series: Sequence[str], stem: Path, notes: Sequence[str] = (), columns: int = 2
) -> None:
    """Bars from zero with intervals; what a test said of two of them, as stars above; see `draw_efficiency`."""
    with matplotlib.rc_context(PAPER):
        marks = max((_most_marks(panel) for panel in panels), default=0)
        figure, axes = _grid(panels, columns, 46 + 5 * marks)
        for axis, panel in zip(axes, panels, strict=True):
            _bars(axis, panel, looks(series))
        legend(figure, _present(panels, series), "bar")
        notes_below(figure, notes)
        figure.draw_without_rendering()  # the marks are spaced by the axes' size
        for axis, panel in zip(axes, panels, strict=True):
            _mark(axis, panel, series)
    publish(figure, stem, _rows(panels))


def _most_marks(panel: Panel) -> int:
    """Of one place."""
    places = [t.place for t in panel.tests if t.p == t.p]
    return max((places.count(p) for p in set(places)), default=0)


def _bars(axis: Axes, panel: Panel, shown: dict[str, Look]) -> None:
    places, present = _places(panel), [name for name in shown if any(v.series == name for v in panel.values)]
    width = _group_width(present) / max(1, len(present))
    for value in panel.values:
        if value.mean != value.mean:
            continue
        one = shown[value.series]
        x = places.index(value.place) + (present.index(value.series) - (len(present) - 1) / 2) * width
        axis.bar(x, value.mean, width * 0.94, color=one.colour, hatch=one.hatch, edgecolor="white", lw=0)
        if value.low == value.low:
            axis.plot([x, x], [value.low, value.high], color=INK, lw=0.8, solid_capstyle="butt")
    axis.set_xticks(range(len(places)), places)
    axis.set_xlim(-0.5, max(0.5, len(places) - 0.5))
    axis.set(xlabel=panel.axis, ylabel=panel.label, title=panel.title)


def _group_width(present: Sequence[str]) -> float:
    return min(BAR_WIDTH, WIDEST * len(present))


def _mark(axis: Axes, panel: Panel, series: Sequence[str]) -> None:
    """Brackets and stars. The library looks at the axes for what is drawn there; the bars' own places tell it where."""
    tests = [t for t in panel.tests if t.p == t.p]
    if panel.largest is not None:
        axis.set_yticks(np.linspace(0, panel.largest, 6))  # what is above has room for marks alone
    if not tests:
        return
    with needed_for("a figure with marks of significance"):
        import pandas as pd
        from matplotlib import pyplot
        from statannotations.Annotator import Annotator

    present = [name for name in series if any(v.series == name for v in panel.values)]
    known = [v for v in panel.values if v.mean == v.mean]
    table = pd.DataFrame(
        {"place": [v.place for v in known], "series": [v.series for v in known], "mean": [v.mean for v in known]}
    )
    pairs = [((t.place, t.series), (t.place, t.against)) for t in tests]
    backend, opened = matplotlib.get_backend(), pyplot.get_fignums()
    pyplot.switch_backend("agg")  # the library asks pyplot for a renderer, which may want a display
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=FutureWarning)  # of pandas and seaborn, for the library
            marks = Annotator(
                axis, pairs, plot="barplot", data=table, x="place", y="mean", hue="series", order=_places(panel),
                hue_order=present, width=_group_width(present),
            )  # fmt: skip
            marks.configure(
                test=None, text_format="star", verbose=0, line_width=0.6, line_height=0.012, text_offset=0.3, color=INK,
                fontsize=SMALLEST, line_offset=0.02, line_offset_to_group=0.03,
            )  # fmt: skip
            marks.set_pvalues([t.p for t in tests])
            marks.annotate()
    finally:
        for number in set(pyplot.get_fignums()) - set(opened):
            pyplot.close(number)
        pyplot.switch_backend(backend)


def draw_dots(panels: Sequence[Panel], series: Sequence[str], stem: Path, notes: Sequence[str] = ()) -> None:
    """A dot with its interval for each class and series, one panel below the other; see `draw_efficiency`."""
    with matplotlib.rc_context(PAPER):
        figure, axes = _grid(panels, 1, 52)
        for axis, panel in zip(axes, panels, strict=True):
            _dots(axis, panel, looks(series))
        legend(figure, _present(panels, series), "dot")
        notes_below(figure, notes)
    publish(figure, stem, _rows(panels))


def _dots(axis: Axes, panel: Panel, shown: dict[str, Look]) -> None:
    places, present = _places(panel), [name for name in shown if any(v.series == name for v in panel.values)]
    for i, name in enumerate(present):
        own = [v for v in panel.values if v.series == name and v.mean == v.mean]
        x = [places.index(v.place) + (i - (len(present) - 1) / 2) * 0.75 / max(1, len(present)) for v in own]
        one = shown[name]
        if own:
            axis.errorbar(
                x, [v.mean for v in own], yerr=_reach(own), color=one.colour, marker=one.marker, ls="none", elinewidth=0.7,
                markersize=3.5, markeredgewidth=0,
            )  # fmt: skip
    for i in range(0, len(places), 2):
        axis.axvspan(i - 0.5, i + 0.5, color="#f3f3f3", lw=0, zorder=0)
    long = sum(map(len, places)) > 90
    axis.set_xticks(
        range(len(places)), places, rotation=35 if long else 0, ha="right" if long else "center", rotation_mode="anchor"
    )
    axis.set_xlim(-0.5, max(0.5, len(places) - 0.5))
    absent = [p for p in places if not any(v.place == p and v.mean == v.mean for v in panel.values)]
    for name in absent:
        axis.text(places.index(name), 0.5, "no value", transform=axis.get_xaxis_transform(), ha="center", fontsize=SMALLEST)
    axis.set(xlabel=panel.axis, ylabel=panel.label, title=panel.title)


def _grid(panels: Sequence[Panel], columns: int, height_mm: float) -> tuple[Any, list[Axes]]:
    """A figure and its axes, one a panel, with letters where there are several."""
    columns = max(1, min(columns, len(panels)))
    rows = math.ceil(max(1, len(panels)) / columns)
    figure = new_figure(DOUBLE_MM if columns > 1 or (len(panels) and _is_wide(panels)) else SINGLE_MM, rows * height_mm + 12)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.remove()
    axes = axes[: len(panels)]
    for place, axis in enumerate(axes):
        if len(panels) > 1:
            letter(axis, place)
    return figure, axes


def _is_wide(panels: Sequence[Panel]) -> bool:
    """Whether a column is too narrow for what is side by side."""
    return max(len(_places(p)) * len({v.series for v in p.values}) for p in panels) > 14


def _places(panel: Panel) -> list[str]:
    return list(dict.fromkeys(v.place for v in panel.values))


def _present(panels: Sequence[Panel], series: Sequence[str]) -> dict[str, Look]:
    """Looks of those that are drawn."""
    drawn = {v.series for panel in panels for v in panel.values}
    return {name: look(i) for i, name in enumerate(series) if name in drawn}


def _rows(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """What is drawn: values, then the tests' p."""
    rows = []
    for panel in panels:
        common = {"panel": panel.title, "what": panel.label}
        rows += [
            {**common, "place": v.place.replace("\n", " "), "series": v.series, "minus": "", "n": v.n, "mean": v.mean,
             "low": v.low, "high": v.high, "p_holm": NAN, "p": NAN}
            for v in panel.values
        ]  # fmt: skip
        rows += [
            {**common, "place": t.place.replace("\n", " "), "series": t.series, "minus": t.against, "n": None, "mean": NAN,
             "low": NAN, "high": NAN, "p_holm": t.p, "p": t.raw}
            for t in panel.tests
        ]  # fmt: skip
    return rows
