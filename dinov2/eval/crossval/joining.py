"""Which line of a table of people is a scan's, and whose the scan is.

A column joins by a way: its cells are the scans' paths, ids, file names (with ending or without), patients, or BIDS subjects.
The column and way that join the most scans are taken, and said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from dinov2.data.volumes.formats import stem
from dinov2.errors import BadInput
from dinov2.eval.crossval.tables import Embeddings, People
from dinov2.files import path_in_list
from dinov2.logging import Say

_BIDS = re.compile(r"sub-[A-Za-z0-9]+")


def _subject(path: str) -> str | None:
    found = _BIDS.search(PurePosixPath(path).name) or _BIDS.search(path)
    return found[0] if found else None


def _name(cell: str) -> str:
    return PurePosixPath(cell.replace("\\", "/")).name


# by name: what a scan is called, and what a cell calls it; the first ones win where they join as many
_Way = tuple[Callable[[Embeddings, int], str | None], Callable[[str, Path], str]]
WAYS: dict[str, _Way] = {
    "path": (lambda e, i: e.scans[i], lambda cell, folder: path_in_list(cell.replace("\\", "/"), folder)),
    "id": (lambda e, i: e.ids[i], lambda cell, folder: cell),
    "file name": (lambda e, i: Path(e.scans[i]).name, lambda cell, folder: _name(cell)),
    "file name without ending": (lambda e, i: stem(e.scans[i]), lambda cell, folder: stem(_name(cell))),
    "patient": (lambda e, i: e.patients[i], lambda cell, folder: cell),
    "BIDS subject (sub-...)": (
        lambda e, i: _subject(e.scans[i]),
        lambda cell, folder: cell if cell.startswith("sub-") else f"sub-{cell}",
    ),
}


def join(
    embeddings: Embeddings, people: People, key: str | None, not_keys: Sequence[str], say: Say
) -> tuple[list[int], list[int]]:
    """Rows of the embeddings and the line of each.

    Args:
        embeddings: The scans.
        people: The lines.
        key: Column that names scans; None: the one that joins the most.
        not_keys: Columns that do not name scans whatever they hold.
        say: Told what joined by what, and an example of each side that did not.

    Raises:
        BadInput: Nothing joins, or two lines have one name.
    """
    columns = [people.require(key, "--key")] if key else [c for c in people.columns if c and c not in not_keys]
    found = [(way, column, *_joined(embeddings, people, column, way)) for way in WAYS for column in columns]
    way, column, matched, repeated = max(found, key=lambda item: (not item[3], len(item[2])))
    if not matched or repeated:
        for _, _, _, twice in found:
            if twice:
                name, first, second = twice
                raise BadInput(
                    f"{people.where(second)}: names the same scans as line {people.numbers[first]} ({name}): "
                    "keep one of them, or name another column by --key"
                )
        raise BadInput(
            f"{people.path}: none of its {len(people.lines)} lines joins with one of the {len(embeddings.ids)} scans of "
            f"{embeddings.path}: no cell of {', '.join(columns)} is a path, id, file name, patient or BIDS subject, such as "
            f"{embeddings.ids[0]}: give a column of them (--key)"
        )
    rows, lines = list(matched), list(matched.values())
    used = set(lines)
    say(
        f"{people.path}: {len(rows)} of {len(embeddings.ids)} scans joined, {len(used)} of {len(people.lines)} lines; "
        f"its column {column} is the scans' {way}"
    )
    without_line = [i for i in range(len(embeddings.ids)) if i not in matched]
    without_scan = [i for i in range(len(people.lines)) if i not in used]
    if without_line:
        say(f"  scans without a line: {len(without_line)}, such as {embeddings.ids[without_line[0]]}")
    if without_scan:
        first = without_scan[0]
        say(f"  lines without a scan: {len(without_scan)}, such as line {people.numbers[first]}, {people.lines[first][column]}")
    return rows, lines


def _joined(
    embeddings: Embeddings, people: People, column: str, way: str
) -> tuple[dict[int, int], tuple[str, int, int] | None]:
    """Line of each row that has one, and a name that two lines have, with these; of such a column nothing is joined."""
    of_scan, of_cell = WAYS[way]
    names = {i: name for i in range(len(embeddings.ids)) if (name := of_scan(embeddings, i))}
    wanted = set(names.values())
    line_of: dict[str, int] = {}
    for number, line in enumerate(people.lines):
        name = of_cell(line[column], people.path.parent) if line[column] else ""
        if name not in wanted:
            continue
        if name in line_of:
            return {}, (line[column], line_of[name], number)
        line_of[name] = number
    return {i: line_of[name] for i, name in names.items() if name in line_of}, None


def groups_of(
    embeddings: Embeddings, people: People, rows: Sequence[int], lines: Sequence[int], column: str | None
) -> tuple[list[str], list[str]]:
    """Whose each joined scan is, and what to warn of.

    Without a column scans of one line are one person's; so are those of a patient of the list, else of a BIDS subject, where
    every scan has one.
    """
    if column:
        groups = [people.value(line, column) for line in lines]
        return groups, _one_scan_of_two(embeddings, rows, groups)
    patients = [embeddings.patients[i] for i in rows]
    subjects = [_subject(embeddings.scans[i]) for i in rows]
    named = next((names for names in (patients, subjects) if all(names)), None)
    groups = [str(line) for line in lines] if named is None or len(set(lines)) < len(lines) else [str(n) for n in named]
    several = [group for group, count in Counter(groups).items() if count > 1]
    warnings = []
    if several:
        example = [embeddings.ids[i] for i, group in zip(rows, groups, strict=True) if group == several[0]]
        warnings.append(
            f"{len(several)} people seem to have several scans, such as {' and '.join(example[:2])}: they are kept together; "
            "--group COLUMN says whose each scan is"
        )
    return groups, [*warnings, *_one_scan_of_two(embeddings, rows, groups)]


def _one_scan_of_two(embeddings: Embeddings, rows: Sequence[int], groups: Sequence[str]) -> list[str]:
    """A warning where two people have the same voxels."""
    first: dict[str, int] = {}
    for place, i in enumerate(rows):
        other = first.setdefault(embeddings.shas[i], place)
        if groups[other] != groups[place]:
            pair = f"{embeddings.ids[rows[other]]} and {embeddings.ids[i]}"
            return [f"{pair} have the same voxels, but are two people here: one may be trained on and the other tested"]
    return []
