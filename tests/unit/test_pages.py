"""The pages that people read: links, anchors and the list of pages lead somewhere, and names of the API are there."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([
    *ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "dinov2").rglob("*.md"), *(ROOT / "tests").rglob("*.md"),
])  # fmt: skip
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
CODE = re.compile(r"^```.*?^```$|^    .*?$|`[^`\n]*`", re.M | re.S)  # fenced, indented, in a line
API = re.compile(r"^::: ([\w.]+)$", re.M)


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """Of a page's headings, where GitHub and the site make the same of them."""
    headings = re.findall(r"^#+ (.+?)\s*$", FENCED.sub("", text_of(path)), re.M)
    plain = [re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings]
    return {text.replace(" ", "-") for text in plain if text.replace(" ", "-") == re.sub(r"[-\s]+", "-", text)}


def test_every_link_of_a_page_leads_to_a_file_and_a_heading() -> None:
    broken = []
    for page, link in [(p, link) for p in PAGES for link in LINK.findall(CODE.sub("", text_of(p)))]:
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = Path(os.path.normpath(page.parent / path)) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append((page.relative_to(ROOT), link))
    assert broken == []


def test_every_page_that_is_named_in_words_is_there() -> None:
    named = re.compile(r"(?<![\w/.])docs/[\w/-]+\.(?:md|ipynb|png)")
    assert [(page, name) for page in PAGES for name in named.findall(text_of(page)) if not (ROOT / name).exists()] == []


def test_a_list_begins_after_an_empty_line_without_which_the_site_shows_none() -> None:
    begins, continues = re.compile(r"(-|\d+\.) "), re.compile(r"- |\d+\. |#|\s|$")
    lines = ((page, pair) for page in PAGES for pair in pairwise(FENCED.sub("", text_of(page)).splitlines()))
    joined = [(page, line) for page, (above, line) in lines if begins.match(line) and not continues.match(above)]
    assert joined == []


def entries(nav: Any) -> list[str]:
    """Pages of mkdocs' list, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in entries(part)]


def test_the_site_lists_every_page_of_docs_once() -> None:
    listed = entries(yaml.safe_load(text_of(ROOT / "mkdocs.yml"))["nav"])
    assert len(listed) == len(set(listed))
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= set(listed)


def test_names_of_the_api_page_are_there_and_say_what_they_are() -> None:
    silent = []
    for name in API.findall(text_of(DOCS / "api.md")):
        module, _, last = name.rpartition(".")
        found = getattr(importlib.import_module(module), last)
        if not inspect.getdoc(found):
            silent.append(name)
    assert silent == []


def test_what_the_pages_import_is_on_the_api_page() -> None:
    listed = set(API.findall(text_of(DOCS / "api.md")))
    imported = {
        f"{module}.{name.strip()}"
        for page in [ROOT / "README.md", *DOCS.rglob("*.md")]
        for module, names in re.findall(r"^ *from (dinov2[\w.]*) import ([\w, ]+)$", text_of(page), re.M)
        for name in names.split(",")
    }
    assert imported and imported - listed == set()
