"""Intervals, tests and corrections against published examples, counting by hand, and simulated comparisons."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dinov2.eval.metrics.statistics import bootstrap_interval
from dinov2.eval.study.statistics import (
    COVERAGE,
    MOST_EXACT,
    bootstrap_coverage,
    bootstrap_means,
    difference,
    estimate,
    hedges_g,
    holm,
    simulated_coverage,
    smallest_p,
    welch,
    wilcoxon,
)

SLEEP_1 = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])  # Student 1908, R's `sleep`
SLEEP_2 = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])


def zeros_like(values: np.ndarray) -> np.ndarray:
    return np.zeros(len(values))


def test_wilcoxon_on_hollander_and_wolfes_depression_scores() -> None:
    """R's `?wilcox.test`: V = 40, one-sided p 0.01953."""
    first = np.array([1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30])
    second = np.array([0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29])
    found = wilcoxon(first, second)
    assert found.statistic == 45 - 40 and found.p == pytest.approx(2 * 0.01953, abs=1e-5)
    assert found.effect_size == pytest.approx((40 - 5) / 45) and found.note == ""


def test_wilcoxon_on_darwins_plants() -> None:
    """Wilcoxon 1945; SciPy's documentation has p 0.041259765625."""
    heights = np.array([6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75.0])
    found = wilcoxon(heights, zeros_like(heights))
    assert (found.statistic, found.p) == (24, 0.041259765625)


def by_counting(differences: np.ndarray) -> float:
    """Two-sided p over all signs of the ranks that are there."""
    differences = differences[differences != 0]
    ranks = stats.rankdata(np.abs(differences))
    smaller = min(ranks[differences > 0].sum(), ranks[differences < 0].sum())
    sums = [ranks[list(signs)].sum() for signs in itertools.product([True, False], repeat=len(ranks))]
    return float(np.mean([min(s, ranks.sum() - s) <= smaller for s in sums]))


@pytest.mark.parametrize(("seed", "size"), [*((seed, 10) for seed in range(5)), (5, 15), (5, 18)])
def test_with_zeros_and_ties_p_is_counted_out_over_all_signs(seed: int, size: int) -> None:
    differences = np.random.default_rng(seed).integers(-3, 5, size=size).astype(float)
    found = wilcoxon(differences, zeros_like(differences))
    assert found.p == pytest.approx(by_counting(differences))
    zeros = int((differences == 0).sum())
    assert (f"{zeros} of {size} differences are zero" in found.note) == (zeros > 0) and "share ranks" in found.note
    assert found.smallest_p == 2.0 ** (1 - (size - zeros))


def test_p_is_scipys_exact_one_up_to_fifty_differences_and_its_approximation_beyond() -> None:
    for n in (7, 25, MOST_EXACT, 200):
        x = np.random.default_rng(n).normal(0.2, 1, n)
        method = "exact" if n <= MOST_EXACT else "asymptotic"
        expected = stats.wilcoxon(np.round(x, 9), method=method).pvalue
        assert wilcoxon(x, zeros_like(x)).p == pytest.approx(expected, rel=1e-9), n


def test_differences_that_are_equal_in_a_table_share_a_rank() -> None:
    """0.3 - 0.1 and 0.4 - 0.2 differ in the last bit."""
    found = wilcoxon(np.array([0.3, 0.4, 0.9]), np.array([0.1, 0.2, 0.1]))
    assert "share ranks" in found.note


def test_five_differences_cannot_go_below_one_sixteenth_and_it_is_said() -> None:
    five = np.arange(1.0, 6.0)
    found = wilcoxon(five, zeros_like(five))
    assert found.p == found.smallest_p == smallest_p(5) == 0.0625 and "n = 5 cannot give p below 0.0625" in found.note
    six = np.arange(1.0, 7.0)
    assert wilcoxon(six, zeros_like(six)).p == 0.03125 and wilcoxon(six, zeros_like(six)).note == ""
    assert wilcoxon(six, zeros_like(six)).effect_size == 1 and wilcoxon(-six, zeros_like(six)).effect_size == -1


def test_equal_runs_and_single_cases_say_so() -> None:
    same = wilcoxon(SLEEP_1, SLEEP_1)
    assert (same.p, same.effect_size, same.note) == (1, 0, "all differences are zero")
    alone = wilcoxon(SLEEP_1[:1], SLEEP_2[:1])
    assert math.isnan(alone.p) and "no p-value" in alone.note


def test_welch_on_students_sleep_data() -> None:
    """R's `t.test(extra ~ group, data = sleep)`: t = -1.8608, p 0.07939, interval -3.3654832 to 0.2054832."""
    found = welch(SLEEP_1, SLEEP_2)
    assert (found.statistic, found.p) == (pytest.approx(-1.8608, abs=5e-5), pytest.approx(0.07939, abs=5e-6))
    assert difference(SLEEP_1, SLEEP_2).t == pytest.approx((-3.3654832, 0.2054832), abs=5e-8)
    assert difference(SLEEP_1, SLEEP_2).mean == pytest.approx(-1.58)


@pytest.mark.filterwarnings("error")
def test_values_that_are_equal_but_for_rounding_are_equal() -> None:
    """Five runs with one AUC, which a mean over classes leaves apart by its last digit."""
    equal = np.array([0.1 + 0.2, 0.3, 0.3, 0.3, 0.1 + 0.2])
    assert "the seeds of neither run differ" in welch(equal, equal + 0.5, "seeds").note
    found = welch(equal, np.array([0.5, 0.6, 0.7, 0.6, 0.5]), "seeds")
    assert found.note == "" and found.p == pytest.approx(stats.ttest_1samp([0.5, 0.6, 0.7, 0.6, 0.5], 0.3).pvalue)


def test_welch_with_unequal_variances_and_sizes() -> None:
    """Wikipedia, "Welch's t-test", example 2: t = -1.57, p 0.149 (Student's p would be 0.045)."""
    first = np.array([17.2, 20.9, 22.6, 18.1, 21.7, 21.4, 23.5, 24.2, 14.7, 21.8])
    second = [
        21.5,
        22.8,
        21.0,
        23.0,
        21.6,
        23.6,
        22.5,
        20.7,
        23.4,
        21.8,
        20.7,
        21.7,
        21.5,
        22.5,
        23.6,
        21.5,
        22.5,
        23.5,
        21.5,
        21.8,
    ]
    found = welch(first, np.array(second))
    assert (found.statistic, found.p) == (pytest.approx(-1.57, abs=0.005), pytest.approx(0.149, abs=0.0005))


def test_the_paired_t_interval_is_students() -> None:
    """R's paired `t.test` of the same data: 0.7001142 to 2.4598858."""
    assert estimate(SLEEP_2 - SLEEP_1).t == pytest.approx((0.7001142, 2.4598858), abs=5e-8)


@pytest.mark.parametrize(
    ("first", "second", "note"), [([0.8], [0.7, 0.6], "1 and 2 seeds"), ([0.8] * 3, [0.7] * 3, "neither run")]
)
def test_seeds_that_allow_no_test_have_no_p_and_the_reason(first: list[float], second: list[float], note: str) -> None:
    found = welch(np.array(first), np.array(second), "seeds")
    assert math.isnan(found.p) and math.isnan(found.effect_size)
    assert found.note.startswith("no p-value: ") and note in found.note


def test_equal_values_have_an_interval_of_no_width() -> None:
    found = difference(np.full(3, 0.1), np.full(3, 0.3))
    assert found.t == pytest.approx((-0.2, -0.2)) and found.bootstrap == pytest.approx((-0.2, -0.2))
    assert estimate(np.full(7, 0.1)).bootstrap == (0.1, 0.1)
    assert np.isnan([*estimate(np.array([0.5])).t, *estimate(np.array([0.5])).bootstrap]).all()


def test_independent_runs_are_drawn_independently() -> None:
    """Two runs with the same values differ by chance alone: an interval as wide as that of one of them, times sqrt(2)."""
    (low, high), (one_low, one_high) = difference(SLEEP_1, SLEEP_1).bootstrap, estimate(SLEEP_1).bootstrap
    assert low < 0 < high and high - low == pytest.approx(math.sqrt(2) * (one_high - one_low), rel=0.1)


def test_hedges_g_is_cohens_d_without_its_bias() -> None:
    """Two values each: the factor is 1 / sqrt(pi) (Hedges 1981, by the gamma function); for ten each 1 - 3 / (4 * 18 - 1)."""
    assert hedges_g(np.array([2.0, 4.0]), np.array([1.0, 3.0])) == pytest.approx(1 / math.sqrt(2) / math.sqrt(math.pi))
    pooled = math.sqrt((SLEEP_1.var(ddof=1) + SLEEP_2.var(ddof=1)) / 2)
    assert hedges_g(SLEEP_1, SLEEP_2) == pytest.approx(-1.58 / pooled * (1 - 3 / (4 * 18 - 1)), rel=1e-3)


def test_holms_correction_on_a_known_example_leaves_untested_ones_out() -> None:
    """Wikipedia, "Holm-Bonferroni method": 0.01, 0.04, 0.03, 0.005."""
    corrected = holm([0.01, math.nan, 0.04, 0.03, 0.005])
    assert corrected[:1] + corrected[2:] == pytest.approx([0.03, 0.06, 0.06, 0.02]) and math.isnan(corrected[1])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def test_a_bootstrap_interval_is_that_of_the_metrics_and_repeats_itself() -> None:
    values = np.random.default_rng(3).normal(0.8, 0.1, 40)
    found = estimate(values).bootstrap
    (other,) = bootstrap_interval(lambda rows: [values[rows].mean()], [str(i) for i in range(40)])
    assert other is not None and found == pytest.approx(other, abs=0.1 * (other[1] - other[0]))
    assert estimate(values).bootstrap == found
    state = np.random.get_state()[1].tolist()
    bootstrap_means(values, seed=5)
    assert np.random.get_state()[1].tolist() == state  # nobody's generator moves


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30, 100])
def test_the_table_of_coverage_is_what_a_simulation_finds(n: int) -> None:
    assert COVERAGE[n] == pytest.approx(simulated_coverage(n, 2000, seed=9), abs=0.025)  # four standard errors and more


def test_coverage_of_two_and_three_values_is_known_and_grows_to_what_is_promised() -> None:
    """Their interval is from the least to the largest: 1 - 2 / 2^n."""
    assert COVERAGE[2] == pytest.approx(0.5, abs=0.01) and COVERAGE[3] == pytest.approx(0.75, abs=0.01)
    assert bootstrap_coverage(5) == COVERAGE[5] and COVERAGE[5] < bootstrap_coverage(7) < COVERAGE[10]
    assert COVERAGE[200] <= bootstrap_coverage(1000) < 0.95 and math.isnan(bootstrap_coverage(1))


def test_a_t_interval_of_five_values_holds_the_mean_in_95_of_100() -> None:
    values = np.random.default_rng(1).standard_normal((1000, 5))
    held = [low <= 0 <= high for low, high in (estimate(row).t for row in values)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize("kind", ["continuous", "with ties and zeros"])
@pytest.mark.parametrize("n", [5, 12, 60])
def test_wilcoxon_finds_nothing_where_nothing_is(n: int, kind: str) -> None:
    """1,000 comparisons of equal runs: p below 0.05 in 5 % at most (four standard errors more), in 12 and 60 nearly as many."""
    draws = np.random.default_rng(n).standard_normal((1000, n))
    draws = draws if kind == "continuous" else np.round(draws * 2)
    share = np.mean([wilcoxon(row, zeros_like(row)).p <= 0.05 for row in draws])
    assert share <= 0.05 + 0.028 and (share == 0 if n == 5 else share > 0.02)


@pytest.mark.parametrize("spread", [1, 4])
def test_welch_finds_nothing_where_nothing_is(spread: float) -> None:
    rng = np.random.default_rng(int(spread))
    share = np.mean([welch(rng.normal(0, 1, 5), rng.normal(0, spread, 5)).p <= 0.05 for _ in range(1000)])
    assert 0.02 < share <= 0.05 + 0.028


def test_holm_keeps_the_errors_of_a_family_at_five_percent() -> None:
    """Ten tests of nothing: one of them is below 0.05 in 40 % of families, and in 5 % after the correction."""
    p = np.random.default_rng(0).random((1000, 10))
    assert np.mean(p.min(1) <= 0.05) > 0.3
    assert np.mean([min(holm(family)) <= 0.05 for family in p]) == pytest.approx(0.05, abs=0.028)
