"""Figures, LaTeX tables and one HTML page of a study, from its tables and `differences`: `OUT/figures`.

As the paper's: curves over the labels (Fig. 2a-d), bars at the third-largest and the largest fraction with what the tests said,
classes (2e), confusion matrices (2f), linear decoders (2g), single cases (5), data that pretraining did not see (6). Intervals
and p come from `statistics`; nothing here makes its own. Reading order: `draw_study` -> `_of_dataset`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov2.data.datalist import Entry
from dinov2.data.volumes.opening import mid_slice
from dinov2.errors import BadInput, BadVolume
from dinov2.eval.study import statistics
from dinov2.eval.study.cells import LabelledSet, labelled_sets
from dinov2.eval.study.compare import MEAN as MEAN_OF_CLASSES
from dinov2.eval.study.compare import Row, lines_of
from dinov2.eval.study.differences import Differences, differences
from dinov2.eval.study.results import ALL, Results
from dinov2.eval.study.schema import Study
from dinov2.eval.study.table import read_table
from dinov2.files import write_text
from dinov2.logging import Say

if TYPE_CHECKING:  # a report without figures needs no matplotlib
    from dinov2.visual.figure_page import Chapter, Table
    from dinov2.visual.figures.panels import Panel, Test, Value

logger = logging.getLogger(__name__)

FOLDER, PAGE = "figures", "report.html"
DRAWN = {"segmentation": ("dice", "hd95_mm"), "classification": ("auc", "f1")}  # the paper's
LABELS = {  # of an axis, and the largest value
    "dice": ("Dice", 1.0), "hd95_mm": ("HD95 (mm)", None), "nsd": ("surface Dice", 1.0), "auc": ("AUC", 1.0), "f1": ("F1", 1.0),
    "volume_error_ml": ("volume error (ml)", None), "balanced_accuracy": ("balanced accuracy", 1.0),
    "calibration_error": ("calibration error", None), "absolute_error": ("absolute error", None),
}  # fmt: skip
LOWER_IS_BETTER = ("hd95_mm", "volume_error_ml", "calibration_error", "absolute_error", "hd95")
LINEAR = "Linear"  # the head of a linear decoder
MOST_MARKS = 10  # pairs of a comparison whose tests are drawn
MOST_PANELS = 4
FRACTIONS = 4  # columns of the figure of single cases
PICTURE_PIXELS = 300  # of the longer side of a case's image


@dataclass
class Drawn:
    """What is drawn, gathered for the page.

    Attributes:
        folder: Of the figures.
        series: Names in the order of their looks.
        chapters: Of the page.
    """

    folder: Path
    series: list[str]
    chapters: list[Chapter] = field(default_factory=list)

    def picture(self, stem: str, caption: str) -> None:
        """A figure that was drawn, into the last chapter."""
        from dinov2.visual.figure_page import Picture

        self.chapters[-1].pictures.append(Picture(self.folder / f"{stem}.png", caption))

    def table(self, stem: str, table: Table) -> None:
        """Write a table for LaTeX, and put it into the last chapter."""
        from dinov2.visual.latex import latex_table

        self.chapters[-1].tables.append(table)
        text = latex_table(table.head, table.rows, table.bold, table.caption, stem)
        write_text(self.folder / f"{stem}.tex", text)

    def write_page(self, title: str, lead: Sequence[str], say: Say) -> None:
        from dinov2.visual.figure_page import figure_page

        write_text(self.folder / PAGE, figure_page(title, lead, [c for c in self.chapters if c.pictures or c.tables]))
        count = sum(len(c.pictures) for c in self.chapters)
        say(f"{self.folder / PAGE}: {count} figures, each beside it as PNG, PDF and CSV, and the tables for LaTeX")


@dataclass(frozen=True)
class DatasetRows:
    """What the tables have of a data set.

    Attributes:
        name: Of the data set.
        task: Of its recipe.
        found: Means and differences, by percent.
        items: Rows of the table of items.
        runs: Rows of the table of runs.
        counts: Labelled cases by percent, as they are written.
        classes: Without the background.
        images: Path of each test case's (first) scan, by its name.
    """

    name: str
    task: str
    found: dict[float, list[Row]]
    items: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    counts: dict[float, str]
    classes: list[str]
    images: Mapping[str, str]

    def place(self, percent: float) -> str:
        """As it stands along an axis."""
        return f"{percent} %\n({self.counts.get(percent, '?')})"

    @property
    def compared(self) -> list[float]:
        """The third-largest (or smallest) and the largest fraction, as in the paper."""
        ordered = sorted(self.found)
        return list(dict.fromkeys([*ordered[-3:][:1], *ordered[-1:]]))

    @property
    def unit(self) -> str:
        return "test cases" if self.task == "segmentation" else "seeds"


def draw_study(study: Study, say: Say, predictions: Callable[[Study, Drawn], None] | None = None) -> Drawn:
    """All figures of a study into `OUT/figures`.

    Args:
        study: It has been collected.
        say: Takes each line.
        predictions: Draws panels too, which takes networks: `predicted.draw_predictions`.

    Raises:
        BadInput: There are no tables, or the folder cannot be written.
    """
    from dinov2.visual.figure_page import Chapter

    sets = labelled_sets(study)
    found = differences(study, {name: labelled.recipe for name, labelled in sets.items()})
    items, runs = read_table(study, "items"), read_table(study, "runs")
    drawn = Drawn(study.output / FOLDER, list(study.methods))
    try:
        drawn.folder.mkdir(parents=True, exist_ok=True)
        data = [dataset_rows(labelled, found, items, runs) for labelled in sets.values()]
        for one in (d for d in data if d.found):
            drawn.chapters.append(Chapter(one.name))
            _of_dataset(one, study.first_method, drawn)
        if predictions is not None:
            predictions(study, drawn)
        _together(study, sets, [d for d in data if d.found], items, runs, drawn)
        drawn.write_page(f"Study {study.name}", _lead(study), say)
    except OSError as err:
        raise BadInput(f"{drawn.folder}: {err.strerror}: make room or choose another output_dir") from err
    return drawn


def _lead(study: Study) -> list[str]:
    from dinov2.visual.figures.panels import STARS

    return [
        f"{len(study.methods)} methods: {', '.join(study.methods)}; seeds {', '.join(map(str, study.seeds))}; "
        f"tests hold {study.first_method} against each other method.",
        f"Intervals: 95 %, percentiles of {statistics.DRAWS} bootstrap draws; of a segmentation of the test cases (of each the "
        "mean of the seeds), of a classification of the seeds.",
        f"Stars: Wilcoxon's signed-rank test of the cases, or Welch's test of the seeds, p by Holm within a metric; {STARS}.",
    ]  # fmt: skip


def dataset_rows(
    labelled: LabelledSet, found: Differences, items: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]
) -> DatasetRows:
    """The part of the tables that a data set's figures are made from."""
    name, recipe = labelled.name, labelled.recipe
    by_percent: dict[float, list[Row]] = {}
    for dataset, percent, row in found:
        if dataset == name:
            by_percent.setdefault(percent, []).append(row)
    own_items, own_runs = ([r for r in rows if r["dataset"] == name] for rows in (items, runs))
    counts: dict[float, set[str]] = {}
    for number in (*own_items, *own_runs):
        counts.setdefault(number["percent"], set()).add(str(number["n_train"]) or "?")
    background = recipe.output_names[:1] if recipe.task == "segmentation" and not recipe.overlapping else []
    classes = [str(c) for c in recipe.output_names if c not in background]
    images = {item.case: item.images[0] for item in labelled.splits.get("test", [])}
    counted = {p: "/".join(sorted(c)) for p, c in counts.items()}
    return DatasetRows(name, recipe.task, by_percent, own_items, own_runs, counted, classes, images)


def _of_dataset(data: DatasetRows, subject: str, drawn: Drawn) -> None:
    """The figures and tables of a data set."""
    from dinov2.visual.figures.panels import draw_dots, draw_efficiency, draw_significance

    metrics, limits = DRAWN[data.task], _limits(data)
    intervals = f"bars and error bars: means and 95 % bootstrap intervals of {data.unit}"
    lone = ["One fraction of labels: points, no curve."] if len(data.found) == 1 else []
    stem = f"efficiency_{data.name}"
    draw_efficiency([efficiency(data, m) for m in metrics], drawn.series, drawn.folder / stem, [*limits, *lone])
    drawn.picture(
        stem, f"{data.name} against the share of labels (labelled cases in brackets); error bars: 95 % bootstrap intervals."
    )

    stem = f"bars_{data.name}"
    panels = [bars(data, m, data.compared) for m in metrics]
    draw_significance(panels, drawn.series, drawn.folder / stem, [*limits, *_test_notes(data, metrics)])
    fractions = " and ".join(f"{p} %" for p in data.compared)
    drawn.picture(
        stem, f"{data.name} at {fractions} of the labels (third-largest and largest fraction); {intervals}; stars: see above."
    )

    percent = data.compared[0]
    stem = f"classes_{data.name}"
    draw_dots([per_class(data, percent)], drawn.series, drawn.folder / stem, [*limits, *_absent(data, percent)])
    drawn.picture(
        stem, f"{data.name}, each class, at {percent} % of the labels; error bars: 95 % bootstrap intervals of {data.unit}."
    )
    if data.task == "classification":
        _single_cases(data, percent, subject, limits, drawn)
    for metric in metrics:
        drawn.table(f"table_{data.name}_{metric}", means_table(data, metric, drawn.series))


def _limits(data: DatasetRows) -> list[str]:
    """What this table cannot show, whatever is drawn of it."""
    rows = [
        row for of in data.found.values() for row in of if row.metric == DRAWN[data.task][0] and _is_mean(row, data.classes)
    ]
    means = [row for row in rows if not row.minus]
    limits = ["One method: nothing to hold it against."] if len({row.run for row in means}) == 1 else []
    if means and max(row.estimate.n for row in means) == 1:
        one = "test case" if data.task == "segmentation" else "seed"
        limits.append(f"One {one}: no interval, no test.")
    return limits


def _is_mean(row: Row, classes: Sequence[str]) -> bool:
    """Whether a row is of all classes together; one class alone is."""
    return row.name in (MEAN_OF_CLASSES, ALL) or (len(classes) == 1 and row.name == classes[0])


def _test_notes(data: DatasetRows, metrics: Sequence[str]) -> list[str]:
    """Why a test has no p, or none that could be small."""
    notes: dict[str, None] = {}
    for percent in data.compared:
        for row in data.found[percent]:
            if row.outcome and row.metric in metrics and _is_mean(row, data.classes):
                is_bound = row.outcome.smallest_p > 1 - statistics.CONFIDENCE
                if math.isnan(row.outcome.p):
                    notes[f"{percent} %: {row.outcome.note}."] = None
                elif is_bound:
                    notes[f"{percent} %: the test cannot give p below {row.outcome.smallest_p:.3g}, whatever the values."] = (
                        None
                    )
    return list(notes)


def _value(row: Row, place: str, at: float = math.nan) -> Value:
    from dinov2.visual.figures.panels import Value

    return Value(row.run, place, row.estimate.mean, *row.estimate.bootstrap, row.estimate.n, at)


def _test(row: Row, place: str) -> Test:
    from dinov2.visual.figures.panels import Test

    assert row.outcome is not None
    return Test(place, row.run, row.minus, row.p_holm, row.outcome.p)


def _panel(metric: str, values: Sequence[Value], tests: Sequence[Test] = (), title: str = "", axis: str = "") -> Panel:
    from dinov2.visual.figures.panels import Panel

    label, largest = LABELS.get(metric, (metric, None))
    return Panel(label, values, tests, title, axis, largest)


def efficiency(data: DatasetRows, metric: str) -> Panel:
    """Means of all methods at all fractions."""
    values = [
        _value(row, data.place(percent), percent)
        for percent, rows in sorted(data.found.items())
        for row in rows
        if row.metric == metric and not row.minus and _is_mean(row, data.classes)
    ]
    return _panel(metric, values, title=data.name, axis="share of labels (labelled cases)")


def bars(data: DatasetRows, metric: str, percents: Sequence[float]) -> Panel:
    """Means at some fractions, and the subject's tests."""
    rows = [(data.place(p), r) for p in percents for r in data.found[p] if r.metric == metric and _is_mean(r, data.classes)]
    values = [_value(row, place) for place, row in rows if not row.minus]
    tests = [_test(row, place) for place, row in rows if row.minus]
    return _panel(metric, values, tests, title=data.name, axis="share of labels (labelled cases)")


def per_class(data: DatasetRows, percent: float) -> Panel:
    """Dice of each class over test cases, or its AUC (against all others) over seeds."""
    from dinov2.visual.figures.panels import Value

    title = f"{data.name}, {percent} % of the labels"
    if data.task == "segmentation":
        rows = [r for r in data.found[percent] if r.metric == "dice" and not r.minus]
        return _panel("dice", [_value(r, r.name) for name in data.classes for r in rows if r.name == name], title=title)
    values = []
    methods = dict.fromkeys(row.run for row in data.found[percent])
    for name in data.classes:
        for method in methods:
            own = [r for r in data.runs if (r["method"], r["percent"], r["class"]) == (method, percent, name)]
            of_seeds = [r["value"] for r in own if r["metric"] == "auc" and r["value"] is not None]
            found = statistics.estimate(np.array(of_seeds))
            values.append(Value(method, name, found.mean, *found.bootstrap, found.n))
    return _panel("auc", values, title=title)


def _absent(data: DatasetRows, percent: float) -> list[str]:
    values = per_class(data, percent).values
    absent = [name for name in data.classes if all(v.n == 0 for v in values if v.place == name)]
    return [f"In no test case that counts: {', '.join(absent)}."] if absent else []


def means_table(data: DatasetRows, metric: str, series: Sequence[str]) -> Table:
    """A row a method, a column a fraction: mean and interval, the best of a fraction bold."""
    from dinov2.visual.figure_page import Table

    panel, percents = efficiency(data, metric), sorted(data.found)
    by_key = {(v.series, v.at): v for v in panel.values}
    methods = [name for name in series if any(v.series == name for v in panel.values)]
    rows = [[name, *(_mean_words(by_key.get((name, float(p)))) for p in percents)] for name in methods]
    bold = set()
    for column, percent in enumerate(percents, 1):
        means = [by_key[name, percent].mean if (name, percent) in by_key else math.nan for name in methods]
        if np.isfinite(means).any():
            bold.add((int((np.nanargmin if metric in LOWER_IS_BETTER else np.nanargmax)(means)), column))
    heads = [f"{p} % ({data.counts.get(p, '?')})" for p in percents]
    caption = (
        f"{data.name}: {panel.label}, mean and 95 % bootstrap interval of {data.unit}, by share of labels (labelled cases)."
    )
    return Table(["method", *heads], rows, caption, bold)


def _mean_words(value: Value | None) -> str:
    if value is None or value.mean != value.mean:
        return "none"
    interval = "" if value.low != value.low else f" ({value.low:.3f} to {value.high:.3f})"
    return f"{value.mean:.3f}{interval}"


def _single_cases(data: DatasetRows, percent: float, subject: str, limits: Sequence[str], drawn: Drawn) -> None:
    """Confusion matrices and probabilities, from the items' probabilities."""
    from dinov2.visual.figures.chances import draw_chances
    from dinov2.visual.figures.matrices import draw_confusion

    matrices = {m: confusion(data, m, percent) for m in drawn.series if any(r["method"] == m for r in data.items)}
    absent = [name for i, name in enumerate(data.classes) if all(np.isnan(matrix[i]).all() for matrix in matrices.values())]
    notes = [f"No test case of: {', '.join(absent)}."] if absent else []
    stem = f"confusion_{data.name}"
    draw_confusion(matrices, data.classes, drawn.folder / stem, [*limits, *notes])
    drawn.picture(stem, f"{data.name} at {percent} % of the labels: rows add up to 1; the mean over seeds.")

    percents = sorted(data.found)[-FRACTIONS:]
    chosen = chances(data, percents, subject, drawn.series)
    stem = f"cases_{data.name}"
    draw_chances(chosen, data.classes, drawn.series, drawn.folder / stem, limits if chosen else ["No test case."])
    words = f"those that {subject} is surest of, in the middle, and least sure of at {percents[-1]} %"
    drawn.picture(
        stem, f"Single test cases of {data.name} ({words}): probability of each class, the mean over seeds; shaded: the truth."
    )


def _probabilities(data: DatasetRows, method: str, percent: float) -> Iterator[tuple[Any, str, str, np.ndarray]]:
    """Seed, case, true class and [classes] of each item of a method; NaN where a probability is not counted."""
    place = {name: i for i, name in enumerate(data.classes)}
    tables: dict[tuple[Any, str], np.ndarray] = {}
    truth: dict[tuple[Any, str], str] = {}
    for row in data.items:
        if row["method"] == method and row["percent"] == percent:
            key = (row["seed"], row["case"])
            if row["metric"] == "correct":
                truth[key] = row["class"]
            elif row["metric"] == "probability" and row["class"] in place:
                table = tables.setdefault(key, np.full(len(place), np.nan))
                table[place[row["class"]]] = np.nan if row["value"] is None else row["value"]
    for key, table in tables.items():
        yield *key, truth.get(key, ""), table


def confusion(data: DatasetRows, method: str, percent: float) -> np.ndarray:
    """[true, predicted]: each seed's shares of a true class, their mean; NaN in the row of a class without a case."""
    size = len(data.classes)
    counts: dict[Any, np.ndarray] = {}
    for seed, _, truth, table in _probabilities(data, method, percent):
        if truth in data.classes and not np.isnan(table).all():
            counts.setdefault(seed, np.zeros((size, size)))[data.classes.index(truth), int(np.nanargmax(table))] += 1
    if not counts:
        return np.full((size, size), np.nan)
    stacked = np.stack(list(counts.values()))  # [seeds, true, predicted]
    totals = stacked.sum(-1, keepdims=True)
    shares = np.divide(stacked, totals, out=np.zeros_like(stacked), where=totals > 0)
    seeds_with = (totals > 0).sum(0)  # [true, 1]
    return np.where(seeds_with > 0, shares.sum(0) / np.maximum(seeds_with, 1), np.nan)


def chances(data: DatasetRows, percents: Sequence[float], subject: str, series: Sequence[str]) -> list[Any]:
    """The cases of which the subject is surest, in the middle, and least sure, by the true class at the largest fraction."""
    from dinov2.visual.figures.chances import Chances

    means: dict[tuple[str, float], dict[str, np.ndarray]] = {}
    truth: dict[str, str] = {}
    for method in series:
        for percent in percents:
            of_case: dict[str, list[np.ndarray]] = {}
            for _, case, true, table in _probabilities(data, method, percent):
                of_case.setdefault(case, []).append(table)
                truth[case] = true
            means[method, percent] = {case: np.mean(tables, 0) for case, tables in of_case.items()}
    leading = next((m for m in (subject, *series) if means.get((m, percents[-1]))), None)
    if leading is None:
        return []
    sure = {
        case: float(table[data.classes.index(truth[case])])
        for case, table in means[leading, percents[-1]].items()
        if truth[case] in data.classes
    }
    ordered = sorted((case for case in sure if sure[case] == sure[case]), key=lambda case: (-sure[case], case))
    if not ordered:
        return []
    chosen = {ordered[0]: "surest", ordered[-1]: "least sure", ordered[(len(ordered) - 1) // 2]: "in the middle"}
    if len(ordered) == 1:
        chosen = {ordered[0]: "the only one"}
    elif len(ordered) == 2:
        chosen = {ordered[0]: "surest", ordered[-1]: "least sure"}
    return [
        Chances(
            case,
            truth[case],
            chosen[case],
            {
                data.place(p): {
                    m: dict(zip(data.classes, map(float, means[m, p][case]), strict=True))
                    for m in series
                    if case in means[m, p]
                }
                for p in percents
            },
            _image(data, case),
        )
        for case in sorted(chosen, key=lambda case: ordered.index(case))
    ]


def _image(data: DatasetRows, case: str) -> np.ndarray | None:
    """Its middle slice; None, said in the log, where the list or the file is not there."""
    try:
        return mid_slice(Entry(data.images[case], ()), PICTURE_PIXELS)
    except KeyError:
        logger.warning("%s: no picture of %s: the list has no such test case", data.name, case)
    except BadVolume as err:
        logger.warning("no picture: %s", err)
    return None


def _together(
    study: Study,
    sets: Mapping[str, LabelledSet],
    data: Sequence[DatasetRows],
    items: Sequence[dict[str, Any]],
    runs: Sequence[dict[str, Any]],
    drawn: Drawn,
) -> None:
    """Figures of several data sets: linear decoders (Fig. 2g), and what pretraining did not see (Fig. 6)."""
    from dinov2.visual.figure_page import Chapter
    from dinov2.visual.figures.panels import draw_significance

    drawn.chapters.append(Chapter("All data sets"))
    segmented = [one for one in data if one.task == "segmentation"]
    if study.paper == "ood" and segmented:
        panels = [bars(one, metric, sorted(one.found)) for one in segmented for metric in DRAWN["segmentation"]]
        notes = [f"{d.name}: {note}" for d in segmented for note in (*_limits(d), *_test_notes(d, DRAWN["segmentation"]))]
        draw_significance(panels, drawn.series, drawn.folder / "out_of_distribution", notes)
        drawn.picture(
            "out_of_distribution", "Organs and modalities that pretraining did not see: means and 95 % intervals of test cases."
        )
    linear = {name: method for name, method in study.methods.items() if study.method(name).head == LINEAR}
    if linear and segmented:
        subject = study.first_method if study.first_method in linear else ""
        recipes = {name: labelled.recipe for name, labelled in sets.items()}
        found = differences(dataclasses.replace(study, methods=linear, subject=subject), recipes)
        own = [dataset_rows(sets[d.name], found, items, runs) for d in segmented]
        own = [d for d in own if d.found]
        notes = [f"{d.name}: {note}" for d in own for note in (*_limits(d), *_test_notes(d, ("dice",)))]
        draw_significance([bars(d, "dice", d.compared) for d in own], drawn.series, drawn.folder / "linear_decoder", notes)
        first = subject or next(iter(linear))
        words = f"Holm's p among these methods, {first} against each other one"
        drawn.picture(
            "linear_decoder", f"Linear decoders on frozen features: Dice, means and 95 % intervals of test cases; {words}."
        )


def draw_comparison(runs: Sequence[Results], rows: Sequence[Row], output: Path, say: Say) -> Drawn:
    """Figures of `dinov2 compare`: means with all pairs' tests, and the classes, into `figures` of its folder.

    Raises:
        BadInput: The folder cannot be written.
    """
    from dinov2.visual.figure_page import Chapter, Table
    from dinov2.visual.figures.panels import STARS, draw_dots, draw_significance

    drawn = Drawn(output / FOLDER, [run.name for run in runs])
    drawn.chapters.append(Chapter("Comparison"))
    classes, metrics = list(runs[0].classes), list(dict.fromkeys(row.metric for row in rows))[:MOST_PANELS]
    means = [row for row in rows if row.metric in metrics and _is_mean(row, classes)]
    pairs = len({(row.run, row.minus) for row in means if row.minus})
    notes = sorted({row.outcome.note for row in means if row.outcome and math.isnan(row.outcome.p)})
    if pairs > MOST_MARKS:
        notes.append(f"{pairs} pairs of runs: too many for marks; comparison.csv has their p.")
    panels = []
    for metric in metrics:
        own = [row for row in means if row.metric == metric]
        tests = [_test(row, "") for row in own if row.minus] if pairs <= MOST_MARKS else []
        panels.append(_panel(metric, [_value(row, "") for row in own if not row.minus], tests))
    try:
        draw_significance(panels, drawn.series, drawn.folder / "means", notes)
        unit = f"{runs[0].unit}s"
        drawn.picture("means", f"Means and 95 % bootstrap intervals of {unit}; stars: p by Holm within a metric; {STARS}.")
        for metric in metrics if len(classes) > 1 else []:
            own = [row for row in rows if row.metric == metric and row.name in classes and not row.minus]
            stem = f"classes_{metric}"
            draw_dots([_panel(metric, [_value(row, row.name) for row in own])], drawn.series, drawn.folder / stem)
            drawn.picture(stem, f"{metric} of each class; error bars: 95 % bootstrap intervals of {unit}.")
        cells = [
            [run.name, *(_mean_words(next((v for v in p.values if v.series == run.name), None)) for p in panels)]
            for run in runs
        ]
        caption = f"Mean and 95 % bootstrap interval of {len(runs[0].items)} test cases ({unit} are drawn)."
        drawn.table("table_means", Table(["run", *(p.label for p in panels)], cells, caption))
        drawn.write_page("Comparison of runs", list(lines_of(runs, rows))[:1], say)
    except OSError as err:
        raise BadInput(f"{drawn.folder}: {err.strerror}: choose another --output") from err
    return drawn
