"""Bootstrap confidence intervals, whose draws are patients: scans of one person are not independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

DRAWS = 2000
SEED = 0


def bootstrap_interval(
    statistics: Callable[[np.ndarray], Sequence[float]], groups: Sequence[str], draws: int = DRAWS, confidence: float = 0.95
) -> list[list[float] | None]:
    """Percentile intervals of several statistics of the same cases.

    Args:
        statistics: Takes row indices [m], drawn with repetition, and gives a number each; NaN where one cannot be computed,
            such as the AUC of a draw without one of the classes: that draw does not count for it.
        groups: Of each case its patient; whole groups are drawn.
        draws: Number of draws.
        confidence: Share of the draws within an interval.

    Returns:
        [low, high] of each statistic; None where fewer than half of the draws could be computed.
    """
    members, drawn = _drawn(groups, draws)
    table = np.array([statistics(np.concatenate([members[g] for g in some])) for some in drawn])  # [draws, statistics]
    return [percentile_interval(column, confidence) for column in table.T]


def _drawn(groups: Sequence[Any], draws: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows of each group, and the groups of each draw."""
    names = sorted(set(groups))
    members = [np.flatnonzero(np.asarray(groups) == name) for name in names]
    rng = np.random.default_rng(SEED)
    return members, [rng.integers(len(names), size=len(names)) for _ in range(draws)]


def drawn_counts(groups: Sequence[Any], draws: int = DRAWS) -> np.ndarray:
    """How often each row counts in the draws of `bootstrap_interval`, [draws, n]: for statistics of all draws at once."""
    members, drawn = _drawn(groups, draws)
    counts = np.empty((draws, len(groups)))
    times = np.array([np.bincount(some, minlength=len(members)) for some in drawn])  # [draws, groups]
    for number, rows in enumerate(members):
        counts[:, rows] = times[:, [number]]
    return counts


def percentile_interval(values: np.ndarray, confidence: float = 0.95) -> list[float] | None:
    """[low, high] of a statistic's draws; None where fewer than half of them could be computed."""
    counted = values[np.isfinite(values)]
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    return np.percentile(counted, tails).tolist() if 2 * len(counted) > len(values) else None
