"""One HTML page of figures and tables that opens offline: pictures inline, every word escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{ title }}</title><style>
*{box-sizing:border-box}body{margin:0;background:#f5f6f8;color:#1c2530;font:15px/1.5 system-ui,sans-serif}
main{max-width:1100px;margin:0 auto;padding:32px 20px}h1{font-size:26px;margin:0 0 6px}h2{font-size:19px;margin:36px 0 0}
h1,h2,p,figcaption,summary{overflow-wrap:anywhere}p{margin:8px 0 0;color:#4d5966}
figure,.table,details{margin:14px 0 0;padding:20px;background:#fff;border:1px solid #e3e7ec;border-radius:10px}
.table{overflow-x:auto}.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(310px,100%),1fr));gap:14px;margin-top:14px}
.grid figure{margin:0;padding:12px}.grid figcaption{margin-top:6px;font-size:13px;line-height:1.4}
img{display:block;max-width:100%;height:auto;margin:0 auto}figcaption{margin-top:12px}table{border-collapse:collapse;width:100%}
th{text-align:left;font-weight:600;vertical-align:bottom}td,th{padding:5px 14px 5px 0;border-bottom:1px solid #e3e7ec}
td{font-variant-numeric:tabular-nums;vertical-align:top;min-width:4.2em;max-width:22em;overflow-wrap:break-word}
@media(min-width:600px){td:last-child{overflow-wrap:anywhere;max-width:none}}.best{font-weight:700}
code{font-size:13px;color:#66717f}nav{display:flex;flex-wrap:wrap;gap:2px 16px;margin-top:8px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(130px,1fr));gap:12px;margin-top:16px}
.tiles div{padding:12px 14px;background:#fff;border:1px solid #e3e7ec;border-radius:10px;line-height:1.3}
.tiles b{display:block;font-size:21px;font-variant-numeric:tabular-nums}.tiles span{color:#4d5966;font-size:13px}
.warning{color:#8a3a00}summary{cursor:pointer}pre{margin:12px 0 0;font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere}
@media (max-width:600px){main{padding:18px 12px}h1{font-size:21px}figure,.table,details{padding:12px}td{max-width:60vw}}
@media print{body{background:#fff;font-size:12px}main{max-width:none;padding:0}nav{display:none}
figure,.table tr,.tiles div{break-inside:avoid}h2{break-after:avoid}figure,.table,details{border-radius:0;padding:8px}}
</style></head><body><main><h1>{{ title }}</h1>{% for line in lead %}<p>{{ line }}</p>{% endfor %}
{% if tiles %}<div class="tiles">
{% for value, name in tiles %}<div><b>{{ value }}</b><span>{{ name }}</span></div>{% endfor %}</div>
{% endif %}{% for line in warnings %}<p class="warning">{{ line }}</p>{% endfor %}
<nav>{% for chapter in chapters %}<a href="#c{{ loop.index }}">{{ chapter.title }}</a>{% endfor %}</nav>
{% for chapter in chapters %}<h2 id="c{{ loop.index }}">{{ chapter.title }}</h2>
{% for line in chapter.lines %}<p>{{ line }}</p>{% endfor %}
{% for table in chapter.tables %}<div class="table"><table><tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}{% set i = loop.index0 %}<tr>
{% for cell in row %}<td{% if (i, loop.index0) in table.bold %} class="best"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% if table.caption %}<p>{{ table.caption }}</p>{% endif %}</div>{% endfor %}
{% if chapter.is_grid %}<div class="grid">{% endif %}
{% for picture in chapter.pictures %}<figure>
<img alt="{{ picture.alt or picture.caption }}" src="data:image/png;base64,{{ picture.data }}"{{ picture.size }}>
<figcaption>{{ picture.caption }}{% if picture.file %} <code>{{ picture.file }}</code>{% endif %}</figcaption></figure>
{% endfor %}{% if chapter.is_grid %}</div>{% endif %}
{% for name, text in chapter.folded %}<details><summary>{{ name }}</summary><pre>{{ text }}</pre></details>{% endfor %}
{% endfor %}</main></body></html>
"""

_ENLARGED = 1.4  # 7 inches of a printed page fill that of a screen


@dataclass(frozen=True)
class Picture:
    """A figure on the page.

    Attributes:
        source: PNG, in a file or in memory.
        caption: Plain text.
        alt: What it shows, where the caption does not say it.
    """

    source: Path | bytes
    caption: str
    alt: str = ""

    @property
    def content(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    @property
    def data(self) -> str:
        return base64.b64encode(self.content).decode()

    @property
    def size(self) -> str:
        """An attribute that shows it in proportion to its size in print, so that the words of all pictures are of one size."""
        from markupsafe import Markup

        content = self.content
        at = content.find(b"pHYs", 0, 1024)  # PNG's dots per metre; Matplotlib writes them
        if at < 0:
            return ""
        inches = int.from_bytes(content[16:20], "big") / int.from_bytes(content[at + 4 : at + 8], "big") / 0.0254
        return Markup(' style="width:{:.2f}in"').format(_ENLARGED * inches)

    @property
    def file(self) -> str:
        return "" if isinstance(self.source, bytes) else self.source.stem


@dataclass(frozen=True)
class Table:
    """Rows of plain text; `bold` are (row, column)."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    bold: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True)
class Chapter:
    """What belongs together, as a data set's.

    Attributes:
        title: Plain text.
        pictures: In order, after the tables.
        tables: In order.
        lines: Plain text beneath the title.
        folded: Long plain text that opens on a click, by its name; last.
        is_grid: Pictures are small, several stand in a row where the screen is wide enough.
    """

    title: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    folded: list[tuple[str, str]] = field(default_factory=list)
    is_grid: bool = False


def figure_page(
    title: str,
    lead: Sequence[str],
    chapters: Sequence[Chapter],
    tiles: Sequence[tuple[str, str]] = (),
    warnings: Sequence[str] = (),
) -> str:
    """The whole page.

    Args:
        title: Plain text.
        lead: Lines of plain text beneath it.
        chapters: In order.
        tiles: (value, name) of the numbers that are seen first.
        warnings: Lines of plain text that are not to be missed.
    """
    from jinja2 import Environment, StrictUndefined

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False).from_string(_PAGE)
    return page.render(title=title, lead=lead, chapters=chapters, tiles=tiles, warnings=warnings)
