"""All finished cells of a study as two tidy tables, one row a number: per item (case) and per run.

    OUT/items.parquet, items.csv    study, method, dataset, percent, n_train, seed, case, class, metric, value
    OUT/runs.parquet, runs.csv      the same without case

Class `mean` is the mean over classes: of a case over those that count there, without the background; of a run as `results.json`
has it. A number that is not counted (a class that neither prediction nor truth has) is empty.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dinov2.data.downstream.lists import percentage
from dinov2.data.downstream.recipes import Recipe
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, BadInput
from dinov2.eval.study import records
from dinov2.eval.study.cells import Cell, cells_of, labelled_sets
from dinov2.eval.study.records import Result
from dinov2.eval.study.schema import Study
from dinov2.files import is_number, read_text, replacing, write_text
from dinov2.logging import Say

COLUMNS = ("study", "method", "dataset", "percent", "n_train", "seed", "case", "class", "metric", "value")
RUN_COLUMNS = tuple(name for name in COLUMNS if name != "case")
MEAN = "mean"  # in the place of a class
SEGMENTATION_METRICS = ("dice", "hd95_mm", "nsd", "volume_error_ml")
RUN_METRICS = {  # of a classification's results.json
    "auc": "test_auc", "f1": "test_f1", "balanced_accuracy": "test_balanced_accuracy",
    "calibration_error": "test_calibration_error",
}  # fmt: skip
Row = dict[str, Any]


def collect(study: Study, say: Say) -> int:
    """Write both tables of the finished cells; exit code 2 where others are left, which are named.

    Raises:
        BadInput: Cells that ran before the study was changed or have other cases than their fellows; files that cannot be
            written.
    """
    sets = labelled_sets(study)
    cells = cells_of(study, sets)
    records.refuse_changed(cells)
    states = {cell.name: records.state_of(cell) for cell in cells}
    finished = [cell for cell in cells if states[cell.name].name == records.FINISHED]
    items, runs = rows_of(study, finished, {name: labelled.recipe for name, labelled in sets.items()})
    for name, columns, rows in (("items", COLUMNS, items), ("runs", RUN_COLUMNS, runs)):
        write_table(study.output / name, columns, rows)
    say(f"{study.output}: items.csv {len(items)} rows, runs.csv {len(runs)} rows, of {len(finished)} cells; .parquet beside")
    for cell in cells:
        state = states[cell.name]
        if state.name != records.FINISHED:
            say(f"not in the tables: {cell.name}: {state.name}{': ' + state.reason if state.reason else ''}")
    return EXIT_OK if len(finished) == len(cells) else EXIT_BAD_INPUT


def rows_of(study: Study, cells: Sequence[Cell], recipes: dict[str, Recipe]) -> tuple[list[Row], list[Row]]:
    """The rows of both tables.

    Raises:
        BadInput: Cells that were trained or tested on other cases than their fellows.
    """
    results = {cell.name: records.read_result(cell) for cell in cells}
    require_same_cases(cells, results)
    items: list[Row] = []
    runs: list[Row] = []
    for cell in cells:
        result = results[cell.name]
        begun = records.identity_of(cell.folder) or {}
        n_train = begun.get("parts", {}).get("training", {}).get("count", result.run.get("n_train"))
        common = {
            "study": study.name, "method": cell.method, "dataset": cell.dataset, "percent": cell.percent, "n_train": n_train,
            "seed": cell.seed,
        }  # fmt: skip
        of_task = _segmentation if cell.task == "segmentation" else _classification
        for row in of_task(result, recipes[cell.dataset]):
            (items if "case" in row else runs).append({**common, **row})
    return items, runs


def require_same_cases(cells: Sequence[Cell], results: dict[str, Result]) -> None:
    """Refuse cells that saw other cases than their fellows.

    Of a data set all have the same test and validation cases; of a data set, percent and seed the same training ones. What was
    recorded when a cell began is compared, and which cases its table has.

    Raises:
        BadInput: Two that differ, by name.
    """
    firsts: dict[tuple[Any, ...], tuple[Cell, Any]] = {}
    for cell in cells:
        parts = (records.identity_of(cell.folder) or {}).get("parts", {})
        tested = sorted({row["case"] for row in results[cell.name].rows})
        seen: dict[tuple[Any, ...], Any] = {(name, cell.dataset): parts.get(name) for name in ("test", "validation")}
        seen[("training", cell.dataset, cell.percent, cell.seed)] = parts.get("training")
        seen[("tested", cell.dataset)] = tested
        for key, value in seen.items():
            first, expected = firsts.setdefault(key, (cell, value))
            if value != expected:
                raise BadInput(
                    f"{cell.name}: has other {key[0]} cases than {first.name}{_which(value, expected)}: compare methods on the "
                    "same list: run the one that is out of date again (--rerun-changed)"
                )


def _which(value: Any, expected: Any) -> str:
    """How two lists of cases differ, in words."""
    if not (isinstance(value, list) and isinstance(expected, list)):
        return ""
    other = sorted(set(value) ^ set(expected))
    return f" ({', '.join(other[:3])}{', ...' if len(other) > 3 else ''})"


def _segmentation(result: Result, recipe: Recipe) -> Iterator[Row]:
    """Rows with `case` are of the table of items, those without of the table of runs."""
    background = None if recipe.overlapping else recipe.output_names[0]
    by_case: dict[str, list[dict[str, str]]] = {}
    for row in result.rows:
        by_case.setdefault(row["case"], []).append(row)
    for case, rows in by_case.items():
        for row in rows:
            yield from (
                {"case": case, "class": row["class"], "metric": m, "value": _value(row[m])} for m in SEGMENTATION_METRICS
            )
        for metric in SEGMENTATION_METRICS:
            values = [_value(row[metric]) for row in rows if row["class"] != background]
            yield {"case": case, "class": MEAN, "metric": metric, "value": _mean([v for v in values if v is not None])}
    test = result.run["test"]
    for name, scores in (*test["per_class"].items(), (MEAN, test["mean"])):
        yield from ({"class": name, "metric": m, "value": _number(scores.get(m))} for m in SEGMENTATION_METRICS)


def _classification(result: Result, recipe: Recipe) -> Iterator[Row]:
    """As `_segmentation`: of an item each class's probability, and whether the likeliest is right (class: the true one)."""
    names = [str(name) for name in result.run["classes"]]
    for row in result.rows:
        chances = {name: _value(row[f"p_{name}"]) for name in names}
        yield from (
            {"case": row["case"], "class": name, "metric": "probability", "value": value} for name, value in chances.items()
        )
        counted = {name: value for name, value in chances.items() if value is not None}
        guess = max(counted, key=lambda name: counted[name]) if counted else ""
        yield {"case": row["case"], "class": row["label"], "metric": "correct", "value": float(guess == row["label"])}
    for name, value in zip(names, result.run["test_auc_per_class"], strict=False):
        yield {"class": name, "metric": "auc", "value": _number(value)}
    yield from ({"class": MEAN, "metric": m, "value": _number(result.run.get(key))} for m, key in RUN_METRICS.items())


def _value(word: str) -> float | None:
    return float(word) if word else None


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def write_table(stem: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """STEM.csv and STEM.parquet, each whole or not at all.

    Raises:
        BadInput: They cannot be written.
    """
    import pyarrow as pa  # here: a plan needs none
    import pyarrow.parquet as pq

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if row[c] is None else repr(row[c]) if isinstance(row[c], float) else row[c] for c in columns])
    whole = {"percent": pa.float64(), "n_train": pa.int32(), "seed": pa.int64(), "value": pa.float64()}
    schema = pa.schema({name: whole.get(name, pa.string()) for name in columns})
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        write_text(stem.with_suffix(".csv"), text.getvalue())
        with replacing(stem.with_suffix(".parquet")) as temporary:
            pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), temporary)
    except OSError as err:
        raise BadInput(f"{stem}.csv: {err.strerror}: make room or choose another output_dir") from err


def read_table(study: Study, name: str) -> list[Row]:
    """The table of `items` or `runs` as `collect` wrote it, in the types of its columns.

    Raises:
        BadInput: It is not there, or no such table.
    """
    path = study.output / f"{name}.csv"
    rows = list(csv.DictReader(io.StringIO(read_text(path, advice="`dinov2 study collect` makes it"))))
    try:
        return [
            {**row, "percent": percentage(row["percent"]), "seed": int(row["seed"]), "value": _value(row["value"])}
            for row in rows
        ]
    except (KeyError, ValueError, TypeError) as err:
        raise BadInput(f"{path}: is no table of {name} ({err}): make it again: dinov2 study collect") from err
