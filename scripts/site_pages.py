"""mkdocs hook: files that lie outside docs/ become pages of the site, and links between them keep working.

Pages are written for a reader of the repository, with relative links. What they link to outside docs/ joins the site: a text of
`PAGES` as a page, any other file as it is, below `files/`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
PAGES = {  # a file of the repository -> its page
    "README.md": "overview.md",
    "FIDELITY.md": "FIDELITY.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "dinov2/weights/README.md": "demo_encoder.md",
}
HOME, INTRODUCTION_ENDS = "index.md", "\n## "
INTRODUCTION = "<!-- the introduction of README.md -->"
LINK = re.compile(r"(?<=\]\()([^()\s#]+)(?=[)#])")
NAMED = re.compile(r"\[[\w/]+\.md\]\(([^()\s#]+)(?=[)#])")  # a link that shows a path


def linked(text: str, source: str) -> Iterator[tuple[str, str]]:
    """Links of a text to files that are there: as written, and the file's path in the repository.

    Args:
        source: The text's own path in the repository.
    """
    for link in LINK.findall(text):
        path = Path(os.path.normpath(ROOT / PurePosixPath(source).parent / link))
        if "://" not in link and path.is_file() and path.is_relative_to(ROOT):
            yield link, path.relative_to(ROOT).as_posix()


def place(path: str) -> str:
    """Where a file of the repository is in the site's sources."""
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return PAGES.get(path) or f"files/{path}" + ("" if Path(path).suffix in (".png", ".txt") else ".txt")  # opened, not stored


def with_links_of(text: str, source: str, page: str) -> str:
    """The text with its links as they lead from a page of the site; a link that shows a path shows the page's title."""
    files = dict(linked(text, source))
    places = {link: os.path.relpath(place(path), PurePosixPath(page).parent) for link, path in files.items()}
    named = NAMED.sub(lambda found: f"[{title(files[found[1]])}]({found[1]}" if found[1] in files else found[0], text)
    return LINK.sub(lambda found: places.get(found[1], found[1]), named)


def title(path: str) -> str:
    """A page's first heading."""
    return read(path).partition("\n")[0].removeprefix("# ")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def introduction() -> str:
    """What README.md says before its first section."""
    return read("README.md").split(INTRODUCTION_ENDS)[0]


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside docs/: the texts of `PAGES`, and every file that a page links to."""
    sources = {f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()} | PAGES.keys()
    wanted = {path for source in sources for _, path in linked(read(source), source)} | PAGES.keys()
    for path in sorted(wanted):
        if not path.startswith(f"{DOCS}/"):
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the introduction into the home page, and turn links."""
    here = page.file.src_uri
    source = next((path for path, name in PAGES.items() if name == here), f"{DOCS}/{here}")
    text = with_links_of(markdown, source, here)
    if here != HOME:
        return text
    if INTRODUCTION not in text:
        raise PluginError(f"docs/{HOME}: the line {INTRODUCTION} is not there")
    return text.replace(INTRODUCTION, with_links_of(introduction(), "README.md", here))
