"""One HTML page that opens offline: tiles of numbers, sections, tables, histograms as SVG, pictures inline."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

NUM_BINS = 24
MAX_ROWS = 30  # of a table; the rest is counted in its last line


def page(title: str, numbers: Sequence[tuple[str, str]], sections: Sequence[tuple[str, str]]) -> str:
    """The whole page.

    Args:
        title: Plain text.
        numbers: (value, name) of each tile.
        sections: (title, HTML) of each.
    """
    tiles = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for value, name in numbers)
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{_STYLE}</style></head>'
        f'<body><main><h1>{title}</h1><div class="tiles">{tiles}</div>{body}</main></body></html>\n'
    )


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of plain text; those beyond `MAX_ROWS` are counted in a last line."""
    shown = list(rows[:MAX_ROWS])
    if len(rows) > len(shown):
        shown = [*shown, (f"and {len(rows) - len(shown):,} more", *[""] * (len(head) - 1))]
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in shown)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{cells}</table>"


def histogram(title: str, values: Iterable[float], unit: str) -> str:
    """An SVG of equal bins, with the range and the median beneath."""
    numbers = np.asarray(list(values), dtype=float)
    if numbers.size == 0:
        return ""
    low, high = float(numbers.min()), float(numbers.max())
    counts, _ = np.histogram(numbers, bins=NUM_BINS, range=(low, high) if high > low else (low - 0.5, low + 0.5))
    width, height = 300, 90
    step = width / NUM_BINS
    bars = "".join(
        f'<rect x="{i * step + 0.5:.1f}" y="{height * (1 - n / counts.max()):.1f}" width="{step - 1:.1f}" '
        f'height="{height * n / counts.max():.1f}" rx="1"/>'
        for i, n in enumerate(counts)
        if n
    )
    axis = f"<span>{low:.4g}{unit}</span><span>median {np.median(numbers):.4g}{unit}</span><span>{high:.4g}{unit}</span>"
    svg = f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img">{bars}</svg>'
    return f'<figure><figcaption>{title}</figcaption>{svg}<div class="axis">{axis}</div></figure>'


def stacked_bars(counts: Mapping[str, Mapping[str, int]], colours: Mapping[str, str]) -> str:
    """A bar for each row, the largest first, in parts.

    Args:
        counts: Of each row's parts; rows beyond `MAX_ROWS` are left out.
        colours: CSS, by part, in their order.
    """
    total = {part: sum(of_row.get(part, 0) for of_row in counts.values()) for part in colours}
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(part)} <b>{total[part]:,}</b></span>'
        for part, colour in colours.items()
        if total[part]
    )
    longest = max((sum(of_row.values()) for of_row in counts.values()), default=1)
    rows = []
    for row, of_row in sorted(counts.items(), key=lambda item: -sum(item[1].values()))[:MAX_ROWS]:
        parts = "".join(
            f'<i style="width:{100 * of_row[part] / longest:.2f}%;background:{colour}" '
            f'title="{html.escape(part)}: {of_row[part]:,}"></i>'
            for part, colour in colours.items()
            if of_row.get(part)
        )
        count = f"{sum(of_row.values()):,}"
        rows.append(f'<div class="bar"><span>{html.escape(row)}</span><div>{parts}</div><b>{count}</b></div>')
    return f'<div class="legend">{legend}</div><div class="bars">{"".join(rows)}</div>'


def square_pixels(plane: np.ndarray, spacing_mm: tuple[float, float], pixels: int) -> np.ndarray:
    """A plane in its true proportions, the nearest voxel for each pixel.

    Args:
        plane: [n, m].
        spacing_mm: Along its axes.
        pixels: Of the longer side.
    """
    sides = [n * s for n, s in zip(plane.shape, spacing_mm, strict=True)]
    numbers = [max(1, round(pixels * side / max(sides))) for side in sides]
    first, second = (np.linspace(0, n - 1, p).round().astype(int) for n, p in zip(plane.shape, numbers, strict=True))
    return plane[np.ix_(first, second)]


def picture(plane: np.ndarray, caption: str) -> str:
    """A grey picture with its caption (HTML) beneath.

    Args:
        plane: [rows, columns] from 0 (black) to 1.
        caption: Escaped by the caller.
    """
    from matplotlib.image import imsave  # here: a page without pictures needs no matplotlib

    buffer = io.BytesIO()
    imsave(buffer, plane, cmap="gray", vmin=0, vmax=1, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


_STYLE = """
:root{--ink:#1c2530;--soft:#66717f;--line:#e3e7ec;--paper:#fff;--back:#f5f6f8;--bar:#3b6fb6}
@media (prefers-color-scheme:dark){
:root{--ink:#e6e9ed;--soft:#99a3af;--line:#333b45;--paper:#1d232b;--back:#14181e;--bar:#6f9fdd}}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px}h1{font-size:26px;margin:0 0 18px}h2{font-size:17px;margin:0 0 14px}
section{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:20px;margin-top:18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px}
.tile{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.tile b{display:block;font-size:24px;font-variant-numeric:tabular-nums}.tile span{color:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:18px;margin-bottom:12px}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:7px;vertical-align:-1px}
.bar{display:grid;grid-template-columns:110px 1fr 70px;gap:12px;align-items:center;margin:5px 0}
.bar>span{text-align:right;color:var(--soft)}.bar>div{display:flex;height:20px;background:var(--back);border-radius:4px;overflow:hidden}
.bar>b{font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%}th{text-align:left;color:var(--soft);font-weight:500}
td,th{padding:6px 12px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}p{color:var(--soft);margin:12px 0 0}
h1,h2,p,td,figcaption{overflow-wrap:anywhere}figure img{max-width:100%}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(280px,1fr));gap:22px}figure{margin:0}
.figures svg{display:block;width:100%;height:90px;border-bottom:1px solid var(--soft)}rect{fill:var(--bar)}
.figures figcaption{margin-bottom:8px}
.axis{display:flex;justify-content:space-between;color:var(--soft);font-size:13px;margin-top:4px}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:14px}
.sheet img{width:100%;height:150px;object-fit:contain;display:block;background:#000;border-radius:6px}
.sheet figcaption{padding:6px 2px 0;font-size:12px;line-height:1.35;color:var(--soft)}
"""
