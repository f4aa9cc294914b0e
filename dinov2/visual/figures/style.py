"""How figures look, and how they are written: sizes of a journal's columns, colours, one file of each form.

Colours are Okabe and Ito's, which the colour-blind tell apart; a marker, a hatch and a dash beside each, for a grey print.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dinov2.files import replacing, write_text

STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
SMALLEST = 6.0  # points, of any text
PAPER: dict[Any, Any] = {
    "font.size": 7, "axes.titlesize": 7, "axes.labelsize": 7, "legend.fontsize": 6.5, "figure.titlesize": 7.5,
    "xtick.labelsize": 6.5, "ytick.labelsize": 6.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "lines.linewidth": 1.1, "lines.markersize": 4, "hatch.linewidth": 0.5, "patch.linewidth": 0.5,
    "pdf.fonttype": 42,  # TrueType, embedded: a text of the figure stays a text
    "svg.fonttype": "none", "text.parse_math": False,  # a name with $ is a name
}  # fmt: skip
SINGLE_MM, DOUBLE_MM = 86.0, 180.0  # widths of one and of two columns
DPI = 300
INK, SOFT = "#222222", "#6b6b6b"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "+++", "|||", "ooo")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (5, 1, 1, 1)),
    (0, (3, 1)),
    (0, (7, 2, 1, 2, 1, 2)),
    (0, (2, 2)),
)


@dataclass(frozen=True)
class Look:
    """Of a series (a method), in every figure the same."""

    colour: str
    marker: str
    hatch: str
    dash: Any


def look(place: int) -> Look:
    """Of the series at a place, from 0; as colours, markers, hatches and dashes differ in number, no look comes twice."""
    return Look(*(kinds[place % len(kinds)] for kinds in (COLOURS, MARKERS, HATCHES, DASHES)))


def looks(series: Sequence[str]) -> dict[str, Look]:
    """Of all series, by their order."""
    return {name: look(i) for i, name in enumerate(series)}


def grey(colour: str) -> float:
    """How light a colour is in a grey print, from 0 (black) to 1."""
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def inches(mm: float) -> float:
    return mm / 25.4


def new_figure(width_mm: float, height_mm: float) -> Figure:
    """Empty, of a size in print."""
    return Figure(figsize=(inches(width_mm), inches(height_mm)), layout="constrained")


def letter(axis: Axes, place: int) -> None:
    """The panel's letter, bold, outside its upper left corner."""
    axis.set_title(chr(ord("a") + place), loc="left", weight="bold", fontsize=8)


def legend(figure: Figure, names: Mapping[str, Look], kind: str) -> None:
    """One for all panels, above them.

    Args:
        names: Series and their looks.
        kind: `line`, `dot` or `bar`.
    """
    if not names:
        return
    handles: list[Any] = []
    for name, one in names.items():
        if kind == "bar":
            handles.append(Patch(facecolor=one.colour, hatch=one.hatch, edgecolor="white", label=name))
        else:
            dash = one.dash if kind == "line" else "none"
            handles.append(Line2D([], [], color=one.colour, marker=one.marker, ls=dash, markeredgewidth=0, label=name))
    columns = max(1, min(len(names), _letters(figure, 6.5) // (max(map(len, names)) + 10)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=2.6, handleheight=1.1)


def _letters(figure: Figure, points: float) -> int:
    """Of a line across it."""
    return int(figure.get_figwidth() * 72 / (0.53 * points))


def wrapped(text: str, mm: float, points: float) -> str:
    """In lines of at most that width, broken at spaces, hyphens and underscores where there are some."""
    letters = max(4, int(inches(mm) * 72 / (0.6 * points)))  # wider ones than of running text: names
    lines = [textwrap.fill(line.replace("_", "_\0 "), letters) for line in text.splitlines()]
    return "\n".join(lines).replace("\0 ", "").replace("\0", "")


def notes_below(figure: Figure, notes: Sequence[str]) -> None:
    """What a figure cannot show, on the figure."""
    if notes:
        text = "\n".join(textwrap.fill(note, _letters(figure, SMALLEST)) for note in dict.fromkeys(notes))
        figure.supxlabel(text, fontsize=SMALLEST, color=SOFT, x=0.01, ha="left")


def save(figure: Figure, path: Path, dpi: int = 110, facecolor: str = "white") -> None:
    """Write a figure in the format of the path's ending."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, facecolor=facecolor)


def publish(figure: Figure, stem: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """STEM.png, STEM.pdf (vectors, fonts embedded, the same bytes for the same figure) and STEM.csv with what is drawn.

    Args:
        stem: The folder is made.
        rows: The numbers, under the columns of the first.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(PAPER):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # one layout for both forms
        save(figure, beside(stem, "png"), DPI)
        with replacing(beside(stem, "pdf")) as temporary:
            figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
    write_text(beside(stem, "csv"), as_csv(rows))


def beside(stem: Path, ending: str) -> Path:
    """A stem may have dots of its own."""
    return stem.with_name(f"{stem.name}.{ending}")


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every digit of a number; nothing where there is none."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else ["nothing"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _cell(v) for k, v in row.items()} for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if value != value else repr(float(value))
    return "" if value is None else value
