"""Bootstrap confidence intervals, whose draws are patients: scans of one person are not independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    names = sorted(set(groups))
    members = [np.flatnonzero(np.asarray(groups) == name) for name in names]
    rng = np.random.default_rng(SEED)
    drawn = [rng.integers(len(names), size=len(names)) for _ in range(draws)]
    table = np.array([statistics(np.concatenate([members[g] for g in some])) for some in drawn])  # [draws, statistics]
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    counted = [column[np.isfinite(column)] for column in table.T]
    return [np.percentile(c, tails).tolist() if 2 * len(c) > draws else None for c in counted]
