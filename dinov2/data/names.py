"""Names of scans where the list gives none: as much of a path's end as tells it apart from the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from dinov2.data.volumes.formats import stem


def names_apart(given: Sequence[object], paths: Sequence[tuple[str, ...]]) -> list[str]:
    """A name for each scan: the given one, else of its path; of several channels what their names share.

    Args:
        given: Of each scan; None or empty where there is none.
        paths: Of each scan's channels.

    Returns:
        Names that differ, as far as names were not given twice and no path comes twice.
    """

    def name(channels: tuple[str, ...], depth: int) -> str:
        letters = takewhile(lambda column: len(set(column)) == 1, zip(*map(stem, channels), strict=False))
        shared = stem(channels[0]) if len(channels) == 1 else "".join(column[0] for column in letters).rstrip("_-. ")
        return "_".join([*Path(channels[0]).parts[-1 - depth : -1], *([shared] if shared else [])])

    deepest = max(len(Path(channels[0]).parts) for channels in paths)
    for depth in range(deepest):
        names = [str(own or name(channels, depth)) for own, channels in zip(given, paths, strict=True)]
        if len(set(names)) == len(names):
            break
    return names
