"""The page that says where things are: each row once, and what it names is there."""

from __future__ import annotations

import re
from collections import Counter

from tests.conftest import ROOT

TABLES = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("## Packages are layers")[0].split("\n\n")


def test_each_row_is_there_once_and_its_folders_and_files_exist() -> None:
    tables = [[line.split(" | ") for line in part.splitlines()[2:]] for part in TABLES if part.startswith("| ")]
    assert len(tables) == 2
    for rows in tables:
        named = Counter(row[0] for row in rows)
        assert [name for name, count in named.items() if count > 1] == []
    gone = []
    for row in (row for rows in tables for row in rows):
        paths = [path for path in re.findall(r"`([\w./*]+)`", row[1]) if "/" in path and "*" not in path]
        bases = [ROOT, ROOT / "dinov2", *(ROOT / "dinov2" / path for path in paths)]  # a folder's own are named after it
        gone += [path for path in paths if not any((base / path).exists() for base in bases)]
    assert gone == []
