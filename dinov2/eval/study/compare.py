"""`dinov2 compare`: runs on the same test items, their means with intervals, their differences with tests.

Of every metric, class and pair of runs, as in the paper: by test case and paired (Wilcoxon), or by seed and unpaired (Welch).
Reading order: `compare` -> `require_comparable` -> `compare_results` -> `lines_of`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.errors import EXIT_OK, BadInput
from dinov2.eval.study import statistics
from dinov2.eval.study.results import Results, read_runs
from dinov2.eval.study.statistics import Estimate, Outcome
from dinov2.files import refuse_output, write_json, write_text
from dinov2.logging import Say

TABLE, RECORD = "comparison.csv", "comparison.json"
Draw = Callable[[Sequence[Results], Sequence["Row"], Path, Say], object]
MEAN = "mean of classes"  # in each case over the classes that count there
_SHOWN = 5  # names in a refusal


@dataclass(frozen=True)
class Row:
    """A run's mean, or the difference of two runs, of one metric and class.

    Attributes:
        minus: The run that is subtracted; empty for a mean.
        not_counted: Cases or seeds without a value, such as where the class is absent; of a difference in either run.
        outcome: The test of a difference.
        p_holm: Its p corrected for all tests of its family: of one metric those of the mean of classes, or of all classes.
        family: How many these are; 0 where there is no test.
    """

    metric: str
    name: str
    run: str
    minus: str
    estimate: Estimate
    not_counted: int
    outcome: Outcome | None = None
    p_holm: float = math.nan
    family: int = 0

    @property
    def shown(self) -> str:
        return f"{self.run} - {self.minus}" if self.minus else self.run

    def as_record(self) -> dict[str, Any]:
        """Plain values under the columns of the table."""
        (low, high), (t_low, t_high) = self.estimate.bootstrap, self.estimate.t
        test = self.outcome or Outcome("", math.nan, math.nan, math.nan, "", math.nan, "")
        return {
            "metric": self.metric, "class": self.name, "run": self.run, "minus": self.minus,
            "n": self.estimate.n, "not_counted": self.not_counted, "mean": self.estimate.mean,
            "bootstrap_low": low, "bootstrap_high": high, "t_low": t_low, "t_high": t_high,
            "test": test.test, "statistic": test.statistic, "p": test.p, "p_holm": self.p_holm,
            "holm_family": self.family or None, "smallest_p": test.smallest_p,
            "effect": test.effect, "effect_size": test.effect_size, "note": test.note,
        }  # fmt: skip


def compare(paths: Sequence[Path], output: Path | None, say: Say, draw: Draw | None = None) -> int:
    """Compare runs, print a table for each metric, and write them.

    Args:
        paths: Of the runs: folders, or files of other software.
        output: Folder of `comparison.csv` and `comparison.json`.
        say: Prints.
        draw: Makes figures of runs and rows in a folder, where there is one.

    Raises:
        BadInput: Runs that cannot be read or compared, or an output that cannot be written.
    """
    if len(paths) < 2:
        raise BadInput(f"{paths[0]}: one run has nothing to be compared with: give two or more")
    if output is not None:
        for name in (TABLE, RECORD):
            refuse_output(output / name, "--output")
    runs = read_runs(paths)
    require_comparable(runs)
    rows = compare_results(runs)
    for line in lines_of(runs, rows):
        say(line)
    if output is not None:
        write(output, runs, rows)
        say(f"{output / TABLE}, {RECORD}: written")
        if draw is not None:
            draw(runs, rows, output, say)
    return EXIT_OK


def require_comparable(runs: Sequence[Results]) -> None:
    """Refuse runs whose test items, classes or kinds differ, or that share no metric.

    Raises:
        BadInput: It names which items are missing where, and how many.
    """
    first = runs[0]
    other = next((run for run in runs if run.unit != first.unit), None)
    if other is not None:
        kinds = f"{first.name} has values of {first.unit}s, {other.name} of {other.unit}s"
        raise BadInput(f"{kinds}: compare segmentations or regressions with each other, and classifications with each other")
    _require_same([set(run.items) for run in runs], runs, "test items", "compare runs of the same test part")
    _require_same([set(run.classes) for run in runs], runs, "classes", "compare runs of the same classes, named alike")
    if not _shared_metrics(runs):
        found = "; ".join(f"{run.name} has {', '.join(run.values)}" for run in runs)
        raise BadInput(f"the runs share no metric: {found}: name the columns alike")


def _require_same(sets: Sequence[set[str]], runs: Sequence[Results], what: str, remedy: str) -> None:
    union = set().union(*sets)
    lacking = [(run.name, sorted(union - own)) for run, own in zip(runs, sets, strict=True) if own != union]
    if lacking:
        parts = [f"{name} lacks {len(names)} of {len(union)} ({_some(names)})" for name, names in lacking]
        raise BadInput(f"{what} differ: {'; '.join(parts)}: {remedy}")


def _some(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*names[:_SHOWN], *more])


def _shared_metrics(runs: Sequence[Results]) -> list[str]:
    return [metric for metric in runs[0].values if all(metric in run.values for run in runs)]


def compare_results(runs: Sequence[Results], pairs: Sequence[tuple[int, int]] | None = None) -> list[Row]:
    """Means and differences of runs that can be compared, by metric and class; p corrected by Holm.

    Args:
        runs: Of the same items or seeds.
        pairs: Places of those whose differences are wanted; None: all pairs.
    """
    rows, pairs = [], list(combinations(range(len(runs)), 2)) if pairs is None else pairs
    for metric in _shared_metrics(runs):
        values = [_with_mean(run.values[metric]) for run in runs]
        of_classes = (_of_class(metric, name, runs, [v[name] for v in values], pairs) for name in values[0])
        rows += _corrected([row for of_class in of_classes for row in of_class])
    return rows


def _with_mean(of_class: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values [n] of each class, before them their mean in each case where there are several classes."""
    if len(of_class) == 1:
        return dict(of_class)
    table = np.stack(list(of_class.values()))  # [classes, n]
    counted = (~np.isnan(table)).sum(0)
    mean = np.where(counted > 0, np.nansum(table, 0) / np.maximum(counted, 1), np.nan)
    return {MEAN: mean, **of_class}


def _of_class(
    metric: str, name: str, runs: Sequence[Results], values: Sequence[np.ndarray], pairs: Sequence[tuple[int, int]]
) -> Iterator[Row]:
    """Means of the runs, then the differences of pairs."""
    for run, own in zip(runs, values, strict=True):
        counted = own[~np.isnan(own)]
        yield Row(metric, name, run.name, "", statistics.estimate(counted), len(own) - len(counted))
    for i, j in pairs:
        run, one, minus, other = runs[i], values[i], runs[j], values[j]
        if run.unit == "case":
            both = ~(np.isnan(one) | np.isnan(other))
            found = (
                statistics.estimate(one[both] - other[both]),
                int((~both).sum()),
                statistics.wilcoxon(one[both], other[both]),
            )
        else:
            one_counted, other_counted = one[~np.isnan(one)], other[~np.isnan(other)]
            not_counted = len(one) + len(other) - len(one_counted) - len(other_counted)
            test = statistics.welch(one_counted, other_counted, "seeds")
            found = statistics.difference(one_counted, other_counted), not_counted, test
        yield Row(metric, name, run.name, minus.name, *found)


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """Rows of one metric with p corrected within its two families: the mean of classes, and all classes."""
    corrected = list(rows)
    for is_mean in (True, False):
        family = {i: row.outcome.p for i, row in enumerate(rows) if row.outcome and (row.name == MEAN) == is_mean}
        tested = sum(not math.isnan(p) for p in family.values())
        for i, p in zip(family, statistics.holm(list(family.values())), strict=True):
            corrected[i] = dataclasses.replace(rows[i], p_holm=p, family=tested)
    return corrected


def lines_of(runs: Sequence[Results], rows: Sequence[Row]) -> Iterator[str]:
    """What is printed: the runs, a table for each metric, and how to read it."""
    classes = f", classes {', '.join(runs[0].classes)}" if runs[0].classes else ""
    yield f"{len(runs)} runs, {len(runs[0].items)} test cases{classes}"
    for run in runs:
        yield f"  {run.name}: {run.path}"
    for metric in dict.fromkeys(row.metric for row in rows):
        yield f"\n{metric}"
        yield from _aligned([_HEAD, *(_cells(row) for row in rows if row.metric == metric)])
    yield ""
    yield from _notes(runs, rows)


_HEAD = ("class", "run", "n", "mean", "95 % bootstrap", "95 % t", "p", "p (Holm)", "effect", "note")


def _cells(row: Row) -> tuple[str, ...]:
    test = row.outcome
    absent = f"{row.not_counted} without a value" if row.not_counted else ""
    tested = [_or_none(f"{x:.3g}", x) for x in (test.p, row.p_holm, test.effect_size)] if test else ["", "", ""]
    note = "; ".join(part for part in (absent, test.note if test else "") if part)
    intervals = [_or_none(f"{low:.4g} to {high:.4g}", low) for low, high in (row.estimate.bootstrap, row.estimate.t)]
    mean = _or_none(f"{row.estimate.mean:.4g}", row.estimate.mean)
    return (row.name, row.shown, str(row.estimate.n), mean, *intervals, *tested, note)


def _or_none(shown: str, value: float) -> str:
    return "none" if math.isnan(value) else shown


def _aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _notes(runs: Sequence[Results], rows: Sequence[Row]) -> Iterator[str]:
    """How to read the tables: intervals and what they hold, tests and what they can say."""
    unit, draws = runs[0].unit, statistics.DRAWS
    yield f"n: {unit}s that count. Intervals of the mean: percentiles of {draws} bootstrap draws of {unit}s, and Student's t."
    coverage = ", ".join(f"{100 * share:.1f} % (n = {n})" for n, share in coverage_of(rows).items())
    if coverage:
        narrow = "A bootstrap interval of few values is too narrow"
        yield f"{narrow}: of normal ones it holds the mean in {coverage}; Student's does in 95 %."
    if unit == "case":
        sizes = sorted({row.estimate.n for row in rows if row.minus})
        least = ", ".join(f"{statistics.smallest_p(n):.2g} of {n} differences" for n in sizes)
        yield "p: Wilcoxon's signed-rank test of the cases' pairs; effect: matched-pairs rank-biserial correlation, -1 to 1."
        yield f"The smallest p that it can give: {least}; those of zero do not count."
    else:
        yield "p: Welch's t-test of the seeds, unpaired; effect: Hedges' g. The t-interval of a difference is Welch's."
    families = " or ".join(map(str, sorted({row.family for row in rows if row.family})))
    if families:
        yield f"p (Holm): corrected for all tests of a metric ({families} of them); the mean of classes is a family of its own."
    left_out = left_out_metrics(runs)
    if left_out:
        yield f"Left out, because not all runs have it: {', '.join(left_out)}."


def coverage_of(rows: Sequence[Row]) -> dict[int, float]:
    """Of each number of values of a mean how often a bootstrap interval holds it."""
    sizes = sorted({row.estimate.n for row in rows if not row.minus})
    return {n: statistics.bootstrap_coverage(n) for n in sizes if n > 1}


def left_out_metrics(runs: Sequence[Results]) -> list[str]:
    """Metrics that some runs have and others have not."""
    shared = _shared_metrics(runs)
    return [metric for metric in dict.fromkeys(m for run in runs for m in run.values) if metric not in shared]


def write(output: Path, runs: Sequence[Results], rows: Sequence[Row]) -> None:
    """Write the table and the record of a comparison into a folder, each whole or not at all.

    Raises:
        BadInput: The folder cannot be made or written to.
    """
    text = io.StringIO()
    records = [row.as_record() for row in rows]
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: cell_text(value) for column, value in record.items()} for record in records)
    content = {
        "runs": {run.name: run.path for run in runs},
        "unit": runs[0].unit,
        "test_items": list(runs[0].items),
        "classes": list(runs[0].classes),
        "left_out_metrics": left_out_metrics(runs),
        "confidence": statistics.CONFIDENCE,
        "bootstrap_draws": statistics.DRAWS,
        "bootstrap_coverage": {str(n): share for n, share in coverage_of(rows).items()},
        "rows": records,
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / TABLE, text.getvalue())
        write_json(output / RECORD, content)
    except OSError as err:
        raise BadInput(f"--output {output}: {err.strerror}: choose another folder") from err


def cell_text(value: Any) -> Any:
    """Of a CSV file: six digits, nothing where there is no number."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
