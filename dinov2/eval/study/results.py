"""Results of finished runs, read for a comparison: folders of our programs, nnU-Net's `summary.json`, tables of others.

Whatever a file is, its rows become the same arrays: a value for each test case, or of a classification for each seed.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.downstream.nnunet import DESCRIPTION, label_names
from dinov2.data.names import names_apart
from dinov2.data.volumes.formats import stem
from dinov2.errors import BadInput
from dinov2.files import is_number, read_json, read_text

PER_CASE, RESULTS, PREDICTIONS, SUMMARY = "per_case.csv", "results.json", "predictions.csv", "summary.json"
IDENTITY = "decisive.json"  # of every evaluation, from its beginning (`dinov2.eval.run`, which brings torch)
FORMS = f"a folder with {PER_CASE}, {RESULTS} or {SUMMARY}, nnU-Net's {SUMMARY}, or a CSV file with case,class,dice"
AGAIN = "it is damaged or half-written: run its program again"
WHOLE = "give the whole folder of the run"
ALL = "all"  # the class of a value that is of all classes together
_SEED_SCORES = ("auc", "f1", "balanced_accuracy", "calibration_error")
_NO_METRICS = (
    "",
    "case",
    "class",
    "nsd_tolerance_mm",
    "patient",
    "fold",
    "seed",
)  # columns; the first is an index without a name
_COUNTS = ("TP", "FP", "FN", "TN", "n_pred", "n_ref")  # of voxels, which nnU-Net lists beside its metrics


@dataclass(frozen=True)
class Results:
    """What a run came to.

    Attributes:
        name: Of the run.
        path: Where it was read.
        unit: What a value is of: case or seed.
        items: Test cases, sorted; where the file tells their labels, with these.
        classes: Names, in the file's order; the background is left out.
        values: Of each metric and class [number of units], in the order of the items, or of the seeds; NaN where a case
            does not count, because the class is absent.
    """

    name: str
    path: str
    unit: str
    items: tuple[str, ...]
    classes: tuple[str, ...]
    values: Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class _Row:
    """A case and class of a file.

    Attributes:
        where: File and line, for messages.
        values: By metric.
    """

    where: str
    case: str
    name: str
    values: Mapping[str, float]


def read_runs(paths: Sequence[Path]) -> list[Results]:
    """Results of several runs, their names those of folders, with as much of the path as tells them apart.

    Raises:
        BadInput: A run that comes twice, is not there, not finished, damaged, or of no known form.
    """
    real = [os.path.realpath(path) for path in paths]
    twice = next((path for i, path in enumerate(paths) if real[i] in real[:i]), None)
    if twice is not None:
        raise BadInput(f"{twice}: is given twice: give each run once")
    named = [path.parent if path.name in (PER_CASE, SUMMARY, RESULTS) else path for path in paths]
    named = [path.with_suffix("") if path.is_file() else path for path in named]
    names = names_apart([None] * len(paths), [(os.path.abspath(path),) for path in named])
    if len(set(names)) < len(names):
        again = next(name for i, name in enumerate(names) if name in names[:i])
        raise BadInput(f"{again}: two of the runs would have this name: rename one of their files or folders")
    return [read_results(path, name) for path, name in zip(paths, names, strict=True)]


def read_results(path: Path, name: str) -> Results:
    """Results of one run.

    Args:
        path: Its folder, or a file of other software.
        name: What it is called.

    Raises:
        BadInput: It is not there, not finished, damaged, or of no known form.
    """
    if path.is_file() and path.name == RESULTS:
        path = path.parent
    if path.is_file():
        return _nnunet(path, name) if path.suffix.lower() == ".json" else _table(path, name, background=None)
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or folder: give {FORMS}")
    if (path / RESULTS).is_file():
        return _folder(path, name, _json_object(path / RESULTS))
    if (path / SUMMARY).is_file():
        return _nnunet(path / SUMMARY, name)
    if any(any(path.glob(file)) for file in (IDENTITY, PER_CASE, PREDICTIONS, "seed_*")):
        raise BadInput(f"{path}: has no {RESULTS}, so its run is not finished: start its command again, which goes on")
    raise BadInput(f"{path}: no results of a run: give {FORMS}")


def _folder(path: Path, name: str, results: Mapping[str, Any]) -> Results:
    """Of a run of ours, by what its `results.json` holds."""
    if isinstance(results.get("test"), dict):
        has_background = "mean_with_background" in results["test"]
        return _table(path / PER_CASE, name, background=0 if has_background else -1)
    if "test_auc" in results:
        return _classification(path, name, results)
    if "test_mae" in results:
        return _regression(path, name)
    raise BadInput(f"{path / RESULTS}: is of no program whose runs are compared: give {FORMS}")


def _json_object(path: Path) -> dict[str, Any]:
    content = read_json(path, remedy=AGAIN)
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds a {type(content).__name__}, no results: {AGAIN}")
    return content


def _read_csv(path: Path, wanted: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Rows of a table by their columns, each with file and line."""
    try:
        lines = list(csv.reader(io.StringIO(read_text(path, advice=WHOLE), newline=""), strict=True))
    except csv.Error as err:
        raise BadInput(f"{path}: cannot be read as CSV: {err}: {AGAIN}") from err
    header = [column.strip() for column in lines[0]] if lines else []
    missing = [column for column in wanted if column not in header]
    if missing or len(set(header)) < len(header):
        what = f"has no column {missing[0]}" if missing else "has two columns of one name"
        raise BadInput(f"{path}: {what}, its first line is {','.join(header)[:80] or 'empty'}: give {','.join(wanted)}, ...")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        if len(line) != len(header):
            raise BadInput(f"{path}, row {number}: has {len(line)} of {len(header)} columns: {AGAIN}")
        rows.append((f"{path}, row {number}", dict(zip(header, (cell.strip() for cell in line), strict=True))))
    if not rows:
        raise BadInput(f"{path}: has no rows: {AGAIN}")
    return rows


def _number(text: str, where: str) -> float:
    """Of a cell; NaN where it is empty."""
    if text.casefold() in ("", "nan"):
        return math.nan
    try:
        value = float(text)
    except ValueError as err:
        raise BadInput(f"{where} is {text}, no number: correct it, or leave it empty where the class is absent") from err
    if math.isinf(value):
        raise BadInput(
            f"{where} is infinite, which has no mean: give a finite value, or leave it empty where it does not count"
        )
    return value


def _has_number(cell: str) -> bool:
    try:
        return not math.isnan(float(cell))
    except ValueError:
        return False


def _table(path: Path, name: str, background: int | None) -> Results:
    """Of a table with a row for each case and class; columns without a number are no metrics.

    Args:
        background: Place of the background among the classes, -1: none of them; None: known by its name.
    """
    rows = _read_csv(path, ("case", "class"))
    metrics = [c for c in rows[0][1] if c not in _NO_METRICS and any(_has_number(row[c]) for _, row in rows)]
    if not metrics:
        raise BadInput(f"{path}: has no column of numbers beside case and class: give case,class,dice")
    tolerances = {row.get("nsd_tolerance_mm", "") for _, row in rows}
    (tolerance,) = tolerances if len(tolerances) == 1 else ("",)
    shown = {"nsd": f"nsd_{tolerance}mm"} if tolerance else {}  # surface Dice of another tolerance is another metric
    cells = []
    for where, row in rows:
        values = {shown.get(m, m): _number(row[m], f"{where}: {m}") for m in metrics}
        cells.append(_Row(where, row["case"], row["class"], values))
    if background is None:
        left_out = {row.name for row in cells if row.name.casefold() == "background"}
    else:
        left_out = (
            set(list(dict.fromkeys(row.name for row in cells))[background : background + 1]) if background >= 0 else set()
        )
    return _assembled(path, name, [row for row in cells if row.name not in left_out])


def _assembled(path: Path, name: str, rows: Sequence[_Row]) -> Results:
    """Rows in any order as arrays.

    Raises:
        BadInput: A row that comes twice or is missing.
    """
    if not rows:
        raise BadInput(f"{path}: has no class beside the background: {AGAIN}")
    found: dict[tuple[str, str], _Row] = {}
    for row in rows:
        if not row.case or not row.name:
            raise BadInput(f"{row.where}: has no {'class' if row.case else 'case'}: complete it")
        if (row.case, row.name) in found:
            raise BadInput(f"{row.where}: case {row.case}, class {row.name} comes twice: give one row of each")
        found[row.case, row.name] = row
    items, classes = sorted({row.case for row in rows}), list(dict.fromkeys(row.name for row in rows))
    lacking = [(case, one) for case in items for one in classes if (case, one) not in found]
    if lacking:
        case, one = lacking[0]
        more = f" ({len(lacking)} rows are missing)" if len(lacking) > 1 else ""
        raise BadInput(
            f"{path}: case {case} has no row of class {one}{more}: complete it, with an empty value where it is absent"
        )
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.values))
    values = {m: {c: np.array([found[i, c].values.get(m, math.nan) for i in items]) for c in classes} for m in metrics}
    return Results(name, str(path), "case", tuple(items), tuple(classes), values)


def _nnunet(path: Path, name: str) -> Results:
    """Of nnU-Net's (version 2) `summary.json`; its labels have the names of the `dataset.json` beside or above it."""
    cases = _json_object(path).get("metric_per_case")
    if not isinstance(cases, list) or not cases:
        raise BadInput(f"{path}: holds no metric_per_case: give the {SUMMARY} that nnU-Net's version 2 writes")
    folders = [folder for folder in path.absolute().parents[:3] if (folder / DESCRIPTION).is_file()]  # fold/validation below it
    names = label_names(folders[0] / DESCRIPTION) if folders else {}
    rows = []
    for number, case in enumerate(cases):
        where = f"{path}: metric_per_case[{number}]"
        file, of_labels = (case.get("prediction_file"), case.get("metrics")) if isinstance(case, dict) else (None, None)
        if not isinstance(file, str) or not isinstance(of_labels, dict):
            raise BadInput(f"{where}: has no prediction_file or no metrics: {AGAIN}")
        for label, metrics in of_labels.items():
            one = names.get(tuple(sorted(int(value) for value in re.findall("[0-9]+", label)))) or label
            if not isinstance(metrics, dict):
                raise BadInput(f"{where}: label {label} has no metrics: {AGAIN}")
            values = {
                m.lower(): _json_number(v, f"{where}: {m} of label {label}") for m, v in metrics.items() if m not in _COUNTS
            }
            rows.append(_Row(where, stem(file), one, values))
    return _assembled(path, name, rows)


def _json_number(value: Any, where: str) -> float:
    """Of JSON; NaN where it is null or NaN."""
    if value is None or value != value:
        return math.nan
    if not is_number(value):
        raise BadInput(f"{where} is {value!r}, no finite number: {AGAIN}")
    return float(value)


def _classification(path: Path, name: str, results: Mapping[str, Any]) -> Results:
    """Of a probe: a value of each score for each seed."""
    file, by_seed = path / RESULTS, results.get("by_seed")
    scores = [score for score in _SEED_SCORES if f"test_{score}" in results]
    seeds = results.get("seeds") if by_seed is not None else [results.get("seed", 0)]
    given = by_seed if by_seed is not None else {f"test_{score}": [results[f"test_{score}"]] for score in scores}
    if not isinstance(seeds, list) or not seeds or not isinstance(given, dict) or not isinstance(results.get("classes"), list):
        raise BadInput(f"{file}: lacks its seeds or classes: {AGAIN}")
    values = {}
    for score in scores:
        numbers = given.get(f"test_{score}")
        if not isinstance(numbers, list) or len(numbers) != len(seeds):
            raise BadInput(f"{file}: has no test_{score} of each of its {len(seeds)} seeds: {AGAIN}")
        values[score] = {ALL: np.array([_json_number(value, f"{file}: test_{score}") for value in numbers])}
    folders = [path / f"seed_{seed}" for seed in seeds] if by_seed is not None else [path]
    items = [_labelled_cases(folder / PREDICTIONS) for folder in folders]
    if any(cases != items[0] for cases in items):
        raise BadInput(f"{path}: its seeds have different test cases: run them again with one list")
    return Results(name, str(path), "seed", items[0], tuple(map(str, results["classes"])), values)


def _labelled_cases(path: Path) -> tuple[str, ...]:
    return tuple(sorted(f"{row['case']} ({row['label']})" for _, row in _read_csv(path, ("case", "label"))))


def _regression(path: Path, name: str) -> Results:
    """Of a ridge regression: the absolute error of each test case."""
    file = path / PREDICTIONS
    rows = _read_csv(file, ("case", "label", "predicted"))
    labelled = [
        (f"{row['case']} ({row['label']})", [_number(row[c], f"{at}: {c}") for c in ("predicted", "label")]) for at, row in rows
    ]
    labelled.sort()
    errors = np.array([abs(predicted - label) for _, (predicted, label) in labelled])
    return Results(name, str(path), "case", tuple(item for item, _ in labelled), (), {"absolute_error": {ALL: errors}})
