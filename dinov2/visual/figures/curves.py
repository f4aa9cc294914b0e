"""One panel of curves against the iteration, as large as a phone is wide; what is not finite is a gap and a cross."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dinov2.visual.figures.style import SOFT, looks

_STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.titlesize": 9.5,
    "text.parse_math": False,
}  # fmt: skip
_INCHES, _DPI = (4.3, 2.9), 150
FEW = 30  # points up to which each has a marker
MANY = 120  # points from which a running mean is drawn over them
_WINDOWS = 40  # of the running mean, in a curve's length


@dataclass(frozen=True)
class Curve:
    """Values [n] at iterations [n]; NaN where there is none."""

    iterations: np.ndarray
    values: np.ndarray

    @property
    def is_finite(self) -> np.ndarray:
        """[n] bool."""
        return np.isfinite(self.values)


@dataclass(frozen=True)
class CurvePanel:
    """What one panel shows.

    Attributes:
        title: Above it.
        curves: By the names of the legend.
        levels: Values for a dotted line each, by what they are.
        starts: Iterations for a thin upright line each.
        is_log: The axis of the values.
    """

    title: str
    curves: Mapping[str, Curve]
    levels: Mapping[str, float] = field(default_factory=dict)
    starts: Sequence[float] = ()
    is_log: bool = False


@matplotlib.rc_context(_STYLE)
def curve_png(panel: CurvePanel) -> bytes | None:
    """PNG of a panel; None where no value of it is finite (or above zero, on a logarithmic axis)."""
    seen = {name: _drawn(curve, panel.is_log) for name, curve in panel.curves.items()}
    if not any(values.size for _, values in seen.values()):
        return None
    figure = Figure(figsize=_INCHES, layout="constrained")
    axis = figure.subplots()
    for start in panel.starts:
        axis.axvline(start, color="0.8", lw=0.8, zorder=0)
    for name, one in looks(list(panel.curves)).items():
        curve, (iterations, values) = panel.curves[name], seen[name]
        is_long = len(values) > MANY
        whole = np.where(curve.is_finite, curve.values, np.nan)  # a gap in the line
        line: dict[str, Any] = {"color": one.colour, "ls": one.dash, "ms": 3}
        if is_long:
            axis.plot(curve.iterations, whole, lw=0.6, alpha=0.35, **line)
            axis.plot(iterations, running_mean(values, len(values) // _WINDOWS), lw=1.4, label=name, **line)
        else:
            axis.plot(curve.iterations, whole, lw=1.3, marker="o" if len(values) <= FEW else "", label=name, **line)
        bad = curve.iterations[~curve.is_finite]
        axis.plot(bad, np.zeros(len(bad)), "x", color=one.colour, ms=5, clip_on=False, transform=axis.get_xaxis_transform())
    for name, level in panel.levels.items():
        axis.axhline(level, color=SOFT, ls=":", lw=1)
        axis.annotate(name, (1, level), (-2, 2), xycoords=axis.get_yaxis_transform(), textcoords="offset points", ha="right",
                      color=SOFT, fontsize=7)  # fmt: skip
    if panel.is_log:
        _logarithmic(axis, np.concatenate([values for _, values in seen.values()]))
    axis.set_title(panel.title, loc="left")
    axis.set_xlabel("iteration")
    axis.margins(x=0.02)
    if len(panel.curves) > 1:
        below = (0.5, -0.24)
        axis.legend(loc="upper center", bbox_to_anchor=below, ncols=2, frameon=False, fontsize=8, handlelength=2.4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})  # the same bytes for the same numbers
    return buffer.getvalue()


def _logarithmic(axis: Axes, values: np.ndarray) -> None:
    """Plain numbers along a logarithmic axis, more of them where it spans little."""
    axis.set_yscale("log")
    decades = np.log10(values.max() / values.min())
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _drawn(curve: Curve, is_log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values that have a place on the axis."""
    kept = curve.is_finite & (curve.values > 0) if is_log else curve.is_finite
    return curve.iterations[kept], curve.values[kept]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` neighbours on either side, fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window, 0), np.minimum(index + window + 1, len(values))
    return (total[high] - total[low]) / (high - low)
