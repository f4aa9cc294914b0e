"""Intervals, tests and effect sizes of a comparison: arrays in, plain numbers out, the same for the same arrays.

n values of a run: of its test cases (item-wise Dice, HD95), or of its seeds (AUC, F1). NaN: cannot be computed; nothing here is
dropped in silence, so that whoever calls drops what does not count and says how many.

Source: 3DINO paper, "Statistical analysis"; what is ours beside it: FIDELITY.md, F-70 and F-71.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats
from scipy.special import gammaln

DRAWS = 1000
CONFIDENCE = 0.95
SEED = 0
NAN = math.nan
MOST_EXACT = 50  # differences up to which Wilcoxon's p is counted out; beyond, its normal approximation is as good
_DIGITS = 9  # of a difference: values of tables have six, and what is equal there has to be equal here
ROUNDING = 10.0**-_DIGITS  # relative: values that differ by less are equal
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)

COVERAGE = {  # of a bootstrap interval, by n: means of `simulated_coverage(n, 4000, seed)` for seeds 0 to 2
    2: 0.504, 3: 0.747, 4: 0.795, 5: 0.828, 6: 0.858, 8: 0.883, 10: 0.901, 15: 0.917, 20: 0.926, 30: 0.937, 50: 0.937,
    100: 0.946, 200: 0.946,
}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, with two 95 % intervals (low, high); NaN for those of fewer than two values.

    Attributes:
        n: Values, or pairs of them; of a difference of independent means the fewer of both.
        mean: Their mean, or the difference.
        bootstrap: Percentiles of `DRAWS` draws. Too narrow for few values: `bootstrap_coverage`.
        t: Student's, of a difference of independent means Welch's; right for few values that are nearly normal.
    """

    n: int
    mean: float
    bootstrap: tuple[float, float]
    t: tuple[float, float]


@dataclass(frozen=True)
class Outcome:
    """A test of two runs, two-sided.

    Attributes:
        test: Its name.
        statistic: Wilcoxon's smaller sum of ranks, Welch's t.
        p: NaN where there is none; `note` says why.
        smallest_p: That so many differences can give, whatever they are; NaN where there is no bound.
        effect: Name of the effect size.
        effect_size: Positive where the first run is the higher one.
        note: What was left out or shared a rank, or why there is no p; may be empty.
    """

    test: str
    statistic: float
    p: float
    smallest_p: float
    effect: str
    effect_size: float
    note: str


def bootstrap_means(values: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """Means of draws with repetition.

    Args:
        values: [..., n]; all leading axes share their draws.
        draws: Number of draws.
        seed: Of the draws.

    Returns:
        [..., draws].
    """
    n = values.shape[-1]
    mean = values.mean(-1, keepdims=True)
    return mean + (values - mean) @ _counts(n, draws, seed).T / n  # equal values keep their mean to the bit


@lru_cache(maxsize=4)
def _counts(n: int, draws: int, seed: int) -> np.ndarray:
    """How often each of n values is drawn, [draws, n]; rows of a comparison share it."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    counts.flags.writeable = False
    return counts


def estimate(values: np.ndarray) -> Estimate:
    """The mean of values [n]; of paired runs, of their differences."""
    n = len(values)
    if n < 2:
        return Estimate(n, float(values[0]) if n else NAN, (NAN, NAN), (NAN, NAN))
    half = stats.t.ppf(TAILS[1], n - 1) * math.sqrt(_variance(values) / n)
    return Estimate(n, float(values.mean()), _percentiles(bootstrap_means(values)), _around(values.mean(), half))


def difference(one: np.ndarray, other: np.ndarray) -> Estimate:
    """The mean of one run's values minus that of an independent one's; drawn independently too."""
    n, mean = min(len(one), len(other)), float(one.mean() - other.mean()) if len(one) and len(other) else NAN
    if n < 2:
        return Estimate(n, mean, (NAN, NAN), (NAN, NAN))
    drawn = bootstrap_means(one) - bootstrap_means(other, seed=SEED + 1)
    error, freedom = _welch_error(one, other)
    half = stats.t.ppf(TAILS[1], freedom) * error if error > 0 else 0.0
    return Estimate(n, mean, _percentiles(drawn), _around(mean, half))


def _variance(values: np.ndarray) -> float:
    """Of a sample; 0 of equal values, whose mean may differ from them in the last bit."""
    return float(values.var(ddof=1)) if np.ptp(values) > 0 else 0.0


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, TAILS)
    return float(low), float(high)


def _around(mean: float, half: float) -> tuple[float, float]:
    return float(mean - half), float(mean + half)


def simulated_coverage(n: int, trials: int, seed: int = SEED) -> float:
    """The share of trials, n normal values each, whose bootstrap interval holds their true mean."""
    values = np.random.default_rng([seed, n]).standard_normal((trials, n))
    low, high = np.quantile(bootstrap_means(values), TAILS, axis=-1)
    return float(((low <= 0) & (high >= 0)).mean())


def bootstrap_coverage(n: int) -> float:
    """How often a 95 % bootstrap interval of n values holds their mean, if they are normal; NaN below two.

    Of skewed values, as HD95, it is less.
    """
    if n < 2:
        return NAN
    known = sorted(COVERAGE, reverse=True)
    return float(np.interp(1 / n, [0, *(1 / k for k in known)], [CONFIDENCE, *(COVERAGE[k] for k in known)]))


def smallest_p(n: int) -> float:
    """The least p of Wilcoxon's two-sided test of n differences: all of one sign, two of the 2^n ways."""
    return min(1.0, 2.0 ** (1 - n))


def wilcoxon(one: np.ndarray, other: np.ndarray) -> Outcome:
    """Wilcoxon's signed-rank test of pairs [n], with the matched-pairs rank-biserial correlation.

    Differences of zero are left out, equal ones share their mean rank. Up to `MOST_EXACT` differences p is counted out, given
    the ranks that are shared: SciPy's exact p where none are, and where some are no approximation takes its place.
    """
    what = "Wilcoxon", "rank-biserial"
    if len(one) < 2:
        return Outcome(what[0], NAN, NAN, 1.0, what[1], NAN, f"no p-value: {len(one)} pair of values, it takes two")
    pairs = np.round(one - other, _DIGITS)
    differing = pairs[pairs != 0]
    n = len(differing)
    if n == 0:
        return Outcome(what[0], 0.0, 1.0, 1.0, what[1], 0.0, "all differences are zero")
    ranks = stats.rankdata(np.abs(differing))
    above, below = float(ranks[differing > 0].sum()), float(ranks[differing < 0].sum())
    smaller = min(above, below)
    p = _exact_p(ranks, smaller) if n <= MOST_EXACT else float(stats.wilcoxon(differing).pvalue)
    notes = [f"{len(pairs) - n} of {len(pairs)} differences are zero and left out"] if n < len(pairs) else []
    notes += ["equal differences share ranks"] if len(np.unique(ranks)) < n else []
    notes += [f"n = {n} cannot give p below {smallest_p(n):.4g}"] if smallest_p(n) > 1 - CONFIDENCE else []
    return Outcome(what[0], smaller, p, smallest_p(n), what[1], (above - below) / (above + below), "; ".join(notes))


def _exact_p(ranks: np.ndarray, smaller: float) -> float:
    """Share of the 2^n ways to give ranks signs whose smaller sum of ranks is no larger than the one found."""
    doubled = np.rint(2 * ranks).astype(int)  # a shared rank may end in a half
    ways = np.zeros(doubled.sum() + 1)  # ways to each sum of the ranks above zero; whole numbers below 2^53
    ways[0] = 1
    for rank in doubled:
        ways[rank:] = ways[rank:] + ways[:-rank]
    return min(1.0, 2 * float(ways[: round(2 * smaller) + 1].sum()) / 2.0 ** len(ranks))


def welch(one: np.ndarray, other: np.ndarray, unit: str = "values") -> Outcome:
    """Welch's t-test of two independent runs, with Hedges' g.

    Args:
        one: Values of a run, [n].
        other: Of the other, [m].
        unit: What the values are, for the note.
    """
    effect, size = "Hedges' g", hedges_g(one, other)
    note = ""
    if min(len(one), len(other)) < 2:
        note = f"no p-value: {len(one)} and {len(other)} {unit}, it takes two of each run"
    elif all(np.ptp(values) <= ROUNDING * np.abs(values).max() for values in (one, other)):
        note = f"no p-value: the {unit} of neither run differ"
    if note:
        return Outcome("Welch", NAN, NAN, NAN, effect, size, note)
    with warnings.catch_warnings():  # one run whose values are equal: its variance is 0, or of rounding, as it should be
        warnings.filterwarnings("ignore", "Precision loss occurred", RuntimeWarning)
        found = stats.ttest_ind(one, other, equal_var=False)
    return Outcome("Welch", float(found.statistic), float(found.pvalue), NAN, effect, size, "")


def _welch_error(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Standard error of the difference of two means, and its degrees of freedom (Welch and Satterthwaite)."""
    parts = np.array([_variance(values) / len(values) for values in (one, other)])
    with np.errstate(invalid="ignore"):
        freedom = parts.sum() ** 2 / (parts**2 / [len(one) - 1, len(other) - 1]).sum()
    return math.sqrt(parts.sum()), float(freedom)


def hedges_g(one: np.ndarray, other: np.ndarray) -> float:
    """Difference of means in pooled standard deviations, without the bias of few values; NaN where these are zero."""
    freedom = len(one) + len(other) - 2
    if min(len(one), len(other)) < 2:
        return NAN
    pooled = sum((len(values) - 1) * _variance(values) for values in (one, other)) / freedom
    unbiased = math.exp(gammaln(freedom / 2) - gammaln((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    return float((one.mean() - other.mean()) / math.sqrt(pooled) * unbiased) if pooled > 0 else NAN


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction of the p-values of a family, in their order; NaN is no test and does not count."""
    values = np.asarray(p, float)
    tested = np.flatnonzero(np.isfinite(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    corrected = np.full(len(values), NAN)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)), 1)
    return corrected.tolist()
