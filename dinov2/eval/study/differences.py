"""Intervals and tests of a study's methods, from its tables: of every data set, share of labels, metric and class.

As in the paper: of a segmentation the values of test cases (the mean of the seeds' ones), paired; of a classification the
scores of the seeds, unpaired. The subject is held against each other method. Source: 3DINO paper, "Statistical analysis".
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dinov2.data.downstream.recipes import Recipe
from dinov2.eval.study.compare import MEAN as MEAN_OF_CLASSES
from dinov2.eval.study.compare import Row, cell_text, compare_results
from dinov2.eval.study.results import ALL, Results
from dinov2.eval.study.schema import Study
from dinov2.eval.study.table import MEAN, RUN_METRICS, SEGMENTATION_METRICS, read_table
from dinov2.files import write_text

TABLE = "comparison.csv"
Differences = list[tuple[str, float, Row]]  # data set, percent, and a mean or a difference


def differences(study: Study, recipes: dict[str, Recipe]) -> Differences:
    """Means of all methods and the subject's differences.

    Raises:
        BadInput: There are no tables.
    """
    items, runs = read_table(study, "items"), read_table(study, "runs")
    found: Differences = []
    for name, recipe in recipes.items():
        is_segmentation = recipe.task == "segmentation"
        of_set = [r for r in (items if is_segmentation else runs) if r["dataset"] == name]
        for percent in study.dataset(name).shares:
            rows = [r for r in of_set if r["percent"] == percent]
            by_method = [[r for r in rows if r["method"] == m] for m in study.methods]
            read = _of_cases if is_segmentation else _of_seeds
            results = [read(m, own, recipe) for m, own in zip(study.methods, by_method, strict=True) if own]
            subject = [i for i, one in enumerate(results) if one.name == study.first_method]
            pairs = [(subject[0], i) for i in range(len(results)) if i != subject[0]] if subject else []
            found += [(name, percent, row) for row in compare_results(results, pairs)] if results else []
    return found


def _of_cases(method: str, rows: Sequence[dict[str, Any]], recipe: Recipe) -> Results:
    """A value of each test case: the mean of those seeds where it counts."""
    background = None if recipe.overlapping else recipe.output_names[0]
    names = [name for name in recipe.output_names if name != background]
    cases = sorted({r["case"] for r in rows})
    place = {case: i for i, case in enumerate(cases)}
    seeds = sorted({r["seed"] for r in rows})
    tables = {(m, name): np.full((len(seeds), len(cases)), np.nan) for m in SEGMENTATION_METRICS for name in names}
    for row in rows:
        table = tables.get((row["metric"], row["class"]))
        if table is not None and row["value"] is not None:
            table[seeds.index(row["seed"]), place[row["case"]]] = row["value"]
    values = {m: {name: _mean_of_seeds(tables[m, name]) for name in names} for m in SEGMENTATION_METRICS}
    return Results(method, "", "case", tuple(cases), tuple(names), values)


def _mean_of_seeds(table: np.ndarray) -> np.ndarray:
    """[seeds, cases] -> [cases]; NaN where no seed has a value."""
    counted = (~np.isnan(table)).sum(0)
    return np.where(counted > 0, np.nansum(table, 0) / np.maximum(counted, 1), np.nan)


def _of_seeds(method: str, rows: Sequence[dict[str, Any]], recipe: Recipe) -> Results:
    """A value of each score for each seed."""
    seeds = sorted({r["seed"] for r in rows})
    values = {}
    for metric in RUN_METRICS:
        own = {r["seed"]: r["value"] for r in rows if r["metric"] == metric and r["class"] == MEAN}
        values[metric] = {ALL: np.array([np.nan if own.get(s) is None else own[s] for s in seeds])}
    return Results(method, "", "seed", (), (), values)


def write_differences(study: Study, found: Differences) -> None:
    """`comparison.csv`, whole or not at all."""
    text = io.StringIO()
    records = [{"dataset": name, "percent": percent, **row.as_record()} for name, percent, row in found]
    writer = csv.DictWriter(text, list(records[0]) if records else ["dataset"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: cell_text(value) for column, value in record.items()} for record in records)
    write_text(study.output / TABLE, text.getvalue())


def significance(found: Differences, metrics: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Lines of the differences of the mean over classes, of some metrics."""
    for name, percent, row in found:
        if row.minus and row.outcome and row.metric in metrics and row.name in (MEAN_OF_CLASSES, ALL, _only(found, name)):
            low, high = row.estimate.bootstrap
            interval = "none" if low != low else f"{low:.4g} to {high:.4g}"
            p, holm = ("none" if x != x else f"{x:.3g}" for x in (row.outcome.p, row.p_holm))
            yield (name, str(percent), row.metric, row.shown, f"{row.estimate.mean:+.4f}", interval, p, holm, row.outcome.note)


def _only(found: Differences, dataset: str) -> str:
    """The class of a data set that has one alone, for which there is no mean of classes."""
    names = {row.name for name, _, row in found if name == dataset}
    return next(iter(names)) if len(names) == 1 else ""
