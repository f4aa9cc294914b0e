"""One HTML page of figures and tables that opens offline: pictures inline, every word escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{ title }}</title><style>
body{margin:0;background:#f5f6f8;color:#1c2530;font:15px/1.5 system-ui,sans-serif}
main{max-width:1100px;margin:0 auto;padding:32px 20px}h1{font-size:26px;margin:0 0 6px}h2{font-size:19px;margin:36px 0 0}
p{margin:8px 0 0;color:#4d5966}
figure,.table{margin:14px 0 0;padding:20px;background:#fff;border:1px solid #e3e7ec;border-radius:10px}
img{display:block;max-width:100%;height:auto;margin:0 auto}figcaption{margin-top:12px}table{border-collapse:collapse;width:100%}
th{text-align:left;font-weight:600}td,th{padding:5px 14px 5px 0;border-bottom:1px solid #e3e7ec}
td{font-variant-numeric:tabular-nums}.best{font-weight:700}code{font-size:13px;color:#66717f}nav a{margin-right:14px}
</style></head><body><main><h1>{{ title }}</h1>{% for line in lead %}<p>{{ line }}</p>{% endfor %}
<nav><p>{% for chapter in chapters %}<a href="#c{{ loop.index }}">{{ chapter.title }}</a>{% endfor %}</p></nav>
{% for chapter in chapters %}<h2 id="c{{ loop.index }}">{{ chapter.title }}</h2>
{% for table in chapter.tables %}<div class="table"><table><tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}{% set i = loop.index0 %}<tr>
{% for cell in row %}<td{% if (i, loop.index0) in table.bold %} class="best"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table><p>{{ table.caption }}</p></div>{% endfor %}
{% for picture in chapter.pictures %}<figure><img alt="{{ picture.caption }}" src="data:image/png;base64,{{ picture.data }}">
<figcaption>{{ picture.caption }} <code>{{ picture.file }}</code></figcaption></figure>
{% endfor %}{% endfor %}</main></body></html>
"""


@dataclass(frozen=True)
class Picture:
    """A figure on the page.

    Attributes:
        path: PNG.
        caption: Plain text.
    """

    path: Path
    caption: str

    @property
    def data(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode()

    @property
    def file(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Table:
    """Rows of plain text; `bold` are (row, column)."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    bold: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True)
class Chapter:
    """What belongs together, as a data set's."""

    title: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def figure_page(title: str, lead: Sequence[str], chapters: Sequence[Chapter]) -> str:
    """The whole page.

    Args:
        title: Plain text.
        lead: Lines of plain text beneath it.
        chapters: In order.
    """
    from jinja2 import Environment, StrictUndefined

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False).from_string(_PAGE)
    return page.render(title=title, lead=lead, chapters=chapters)
