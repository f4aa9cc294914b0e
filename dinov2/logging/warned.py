"""`warnings.json` of a run: one JSON object a line, `{"iteration", "name", "value", "message"}`, continued on resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov2.files import from_json, is_number, to_json, write_text

WARNINGS_FILE = "warnings.json"


def read_warnings(output_dir: Path) -> list[dict[str, Any]]:
    """The objects of a run's file, by their iteration; what is no such line, as one that a kill has cut, is left out."""
    path = output_dir / WARNINGS_FILE
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = from_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and is_number(row.get("iteration")) and isinstance(row.get("name"), str):
            found.append(row)
    return sorted(found, key=lambda row: row["iteration"])


class WarningFile:
    """Appends warnings from an iteration on; those that a killed run wrote beyond it are cut first.

    Args:
        output_dir: Folder of the run.
        start_iteration: First iteration that will be written.
    """

    def __init__(self, output_dir: Path, start_iteration: int) -> None:
        kept = [row for row in read_warnings(output_dir) if row["iteration"] < start_iteration]
        self._written = {(row["iteration"], row["name"]) for row in kept}
        self._path = output_dir / WARNINGS_FILE
        write_text(self._path, "".join(to_json(row) + "\n" for row in kept))

    def add(self, row: Mapping[str, Any]) -> bool:
        """Append a warning; False: it is there already, as when a resumed run goes through its earlier rows again."""
        key = row["iteration"], row["name"]
        if key in self._written:
            return False
        self._written.add(key)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(to_json(dict(row)) + "\n")
        return True
