"""The pages of a segmentation, a classification, a regression and a cross-validated probe: what their folders hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.errors import BadInput
from dinov2.eval.crossval.scores import NAMES as PROBE_NAMES
from dinov2.eval.study.compare import MEAN, compare_results
from dinov2.eval.study.results import IDENTITY, PER_CASE, RESULTS, read_results
from dinov2.files import is_number
from dinov2.report.panels import add_panel, metric_chapters
from dinov2.report.record import (
    RUN_FILE,
    Log,
    Rows,
    config_chapter,
    environment_chapter,
    read_config,
    read_log,
    read_object,
    read_rows,
    shown,
    some,
)
from dinov2.visual.figure_page import Chapter, Picture, Table, figure_page
from dinov2.visual.figures.curves import Curve, CurvePanel

SEGMENTATION_METRICS = {"dice": "Dice", "hd95_mm": "HD95 (mm)", "nsd": "surface Dice", "volume_error_ml": "volume error (ml)"}
SCORES = {
    "test_auc": "AUC", "test_f1": "F1", "test_balanced_accuracy": "balanced accuracy",
    "test_calibration_error": "calibration error", "test_mae": "mean absolute error", "test_r": "correlation r",
    "median_mae": "mean absolute error of always the median",
}  # fmt: skip
LONG = ("config", "recipe")  # of `decisive.json`: folded
MOST_CLASSES = 20  # of a confusion matrix that is shown
_FIGURES = ("roc.png", "scatter.png")  # of a probe


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Turn what another content than the program's raises into one line.

    Raises:
        BadInput: The file holds something else.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as err:
        raise BadInput(f"{path}: is not as its program writes it ({err!r}): move it away, or run the program again") from err


def evaluation_page(folder: Path) -> str:
    """The page of a segmentation, classification or regression, finished or not.

    Raises:
        BadInput: It has neither numbers nor results, or one of its files cannot be used.
    """
    decisive, results, metrics = read_object(folder / IDENTITY), read_object(folder / RESULTS), read_rows(folder)
    log, config = read_log(folder), read_config(folder)
    seeds = sorted(folder.glob(f"seed_*/{RESULTS}"))
    if not results and not metrics.values and not seeds:
        raise BadInput(f"{folder}: has no numbers yet (no {RESULTS}, no metrics): let the run go on")
    is_segmentation = "segmentation_head" in decisive
    warnings = [] if results else [f"Not finished: there is no {RESULTS} yet."]
    with as_written(folder / RESULTS):
        own = segmentation_chapters(folder, results, log) if is_segmentation else score_chapters(results)
        chapters = list(own)
        found = result_tiles(results)
    chapters += [*picture_chapters(folder), *map(seed_chapter, seeds), *metric_chapters(metrics.values, log.resumes)]
    chapters += [
        run_chapter(decisive, log, metrics),
        config_chapter(config),
        environment_chapter(read_object(folder / RUN_FILE)),
    ]
    kind = "Segmentation" if is_segmentation else "Regression" if "test_mae" in results else "Classification"
    return figure_page(f"{kind} {folder.resolve().name}", _lead(folder, decisive), chapters, found, warnings)


def _lead(folder: Path, decisive: Mapping[str, Any]) -> list[str]:
    lines = [f"Folder {folder.resolve()}."]
    words = {"dataset_name": "data set", "dataset_percent": "share of its training part (%)", "model_name": "method",
             "segmentation_head": "head", "dataset_seed": "seed"}  # fmt: skip
    told = [f"{name} {shown(decisive[key])}" for key, name in words.items() if decisive.get(key) is not None]
    return [*lines, *([f"Of {'; '.join(told)}."] if told else [])]


def result_tiles(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The test's numbers that are seen first."""
    tiles: list[tuple[str, str]] = []
    if isinstance(results.get("test"), dict):
        test = results["test"]
        tiles += [(shown(test["mean"].get(key), 3), f"{name}, test") for key, name in SEGMENTATION_METRICS.items()]
        tiles.append((shown(test.get("num_cases")), "test cases"))
    tiles += [(shown(results[key], 3), f"{name}, test") for key, name in SCORES.items() if key in results]
    names = {"n_train": "training cases", "n_validation": "validation cases", "n_test": "test cases"}
    tiles += [(shown(results[key]), name) for key, name in names.items() if key in results]
    names = {"parameters_trained": "parameters trained", "parameters": "parameters", "seconds_per_volume": "s per test volume"}
    return [*tiles, *((shown(results[key], 3), name) for key, name in names.items() if key in results)]


def segmentation_chapters(folder: Path, results: Mapping[str, Any], log: Log) -> Iterator[Chapter]:
    """The test's table with intervals, and the validations."""
    test = results.get("test")
    if isinstance(test, dict):
        yield Chapter("Test", tables=[test_table(folder, test)], lines=_absences(test))
    panels = list(_validations(results, test, log))
    if panels:
        chapter = Chapter("Validation", is_grid=True)
        for panel in panels:
            add_panel(chapter, panel)
        yield chapter


def test_table(folder: Path, test: Mapping[str, Any]) -> Table:
    """Means of `results.json`; intervals of the cases, as `dinov2 compare` computes them."""
    intervals, note = _intervals(folder)
    rows = []
    for label, key, values in (
        ("mean of classes", MEAN, test["mean"]), *((name, name, values) for name, values in test["per_class"].items())
    ):  # fmt: skip
        cells = [f"{shown(values.get(metric), 3)}{intervals.get((metric, key), '')}" for metric in SEGMENTATION_METRICS]
        rows.append([label, *cells])
    background = ", the mean of classes without the background" if "mean_with_background" in test else ""
    caption = f"Means of the test cases ({shown(test.get('num_cases'))}){background}; {note}"
    return Table(["class", *SEGMENTATION_METRICS.values()], rows, caption)


def _intervals(folder: Path) -> tuple[dict[tuple[str, str], str], str]:
    """95 % intervals in brackets, by metric and class, and what they are."""
    try:
        found = compare_results([read_results(folder, "run")])
    except BadInput as err:
        return {}, f"no intervals: {err}."
    words = {}
    for row in found:
        low, high = row.estimate.bootstrap
        if math.isfinite(low) and math.isfinite(high):
            words[row.metric, row.name] = f" ({low:.3g} to {high:.3g})"
    if len({row.name for row in found}) == 1:  # one class is the mean, too
        words |= {(metric, MEAN): text for (metric, _), text in words.items()}
    if not words:
        return {}, "one case: no intervals."
    return words, f"in brackets 95 % bootstrap intervals of the cases ({PER_CASE}), as of dinov2 compare."


def _absences(test: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, words in (
        ("absent_in_both", "neither in truth nor in prediction, not counted"),
        ("absent_in_one", "in one alone"),
    ):
        if test.get(key):
            lines.append(f"Cases with a class {words}: {', '.join(f'{k} {shown(v)}' for k, v in test[key].items())}.")
    return lines


def _validations(results: Mapping[str, Any], test: Any, log: Log) -> Iterator[CurvePanel]:
    """Dice, by class where the results tell, and the mean training loss; of a run that is not finished as its log says."""
    iterations = np.array(results.get("iters_list", []), float)
    if len(iterations):
        names = list(test["per_class"]) if isinstance(test, dict) else []
        per_class = np.array(results["val_per_cls_dice_list"], float)  # [validations, classes]
        if names and per_class.shape == (len(iterations), len(names)):
            yield CurvePanel(
                "validation Dice of each class", {n: Curve(iterations, v) for n, v in zip(names, per_class.T, strict=True)}
            )
        mean = "mean, with the background" if isinstance(test, dict) and "mean_with_background" in test else "mean"
        yield CurvePanel(f"validation Dice, {mean}", {mean: Curve(iterations, np.array(results["val_dice_list"], float))})
        yield CurvePanel(
            "training loss between validations", {"loss": Curve(iterations, np.array(results["train_loss_list"], float))}
        )
    elif log.validated:
        iterations, losses, dice = np.array(log.validated, float).T
        yield CurvePanel("validation Dice, mean of classes", {"Dice": Curve(iterations, dice)})
        yield CurvePanel("training loss between validations", {"loss": Curve(iterations, losses)})


def picture_chapters(folder: Path) -> Iterator[Chapter]:
    """The pictures that the run drew: a validation case, the worst test cases."""
    validation = folder / "validation_case.png"
    if validation.is_file():
        words = "A validation case with the outlines of what the network predicts, at the last validation."
        yield Chapter("A validation case", pictures=[Picture(validation.read_bytes(), words)])
    dice = _dice_of_cases(folder)
    worst = sorted((folder / "worst").glob("*.png"))
    chapter = Chapter(
        "The worst test cases", lines=["Lowest Dice first; the truth beside the prediction, in their own proportions."]
    )
    for path in sorted(worst, key=lambda path: (path.stem.rpartition("_")[0], path.stem.endswith("_prediction"))):
        stem, _, what = path.stem.rpartition("_")
        name = stem.partition("_")[2]
        found = [value for case, value in dice.items() if Path(case).name == name]
        score = f", mean Dice {found[0]:.3f}" if len(found) == 1 else ""
        chapter.pictures.append(Picture(path.read_bytes(), f"{name}{score}: {what}."))
    if worst:
        yield chapter


def _dice_of_cases(folder: Path) -> dict[str, float]:
    """Mean of the classes that count in each case, without the background; empty where the table cannot be read."""
    try:
        found = read_results(folder, "run")
    except BadInput:
        return {}
    table = np.stack(list(found.values["dice"].values())) if "dice" in found.values else np.empty((0, 0))
    means = {}
    for case, values in zip(found.items, table.T, strict=False):
        counted = values[~np.isnan(values)]
        if len(counted):
            means[case] = float(counted.mean())
    return means


def score_chapters(results: Mapping[str, Any]) -> Iterator[Chapter]:
    """Scores with intervals, classes, confusion, what the validation part chose."""
    if not results:
        return
    chapter = Chapter("Test")
    rows = []
    for key, name in SCORES.items():
        if key in results:
            interval, spread = results.get(f"{key}_ci95"), results.get(f"{key}_std")
            told = f"{shown(interval[0], 3)} to {shown(interval[1], 3)}" if interval else ""
            rows.append((name, shown(results[key], 4), told, "" if spread is None else shown(spread, 3)))
    head = ("score", "value", "95 % interval", "standard deviation of seeds")
    width = 4 if any(row[3] for row in rows) else 3
    chapter.tables.append(Table(head[:width], [row[:width] for row in rows], "As results.json has them."))
    classes = results.get("classes")
    if classes and results.get("test_auc_per_class"):
        of_class = zip(classes, results["test_auc_per_class"], strict=True)
        rows_of_classes = [(str(name), shown(value, 4)) for name, value in of_class]
        chapter.tables.append(Table(("class", "AUC against the rest"), rows_of_classes, ""))
    if classes and results.get("confusion_matrix") and len(classes) <= MOST_CLASSES:
        matrix = zip(classes, results["confusion_matrix"], strict=True)
        caption = "Test cases by their true class (rows) and what they are taken for (columns)."
        chapter.tables.append(Table(["", *map(str, classes)], [[str(n), *map(shown, row)] for n, row in matrix], caption))
    if results.get("by_seed"):
        seeds = results.get("seeds") or list(range(len(next(iter(results["by_seed"].values())))))
        rows_of_seeds = [
            [shown(seed), *(shown(values[i], 4) for values in results["by_seed"].values())] for i, seed in enumerate(seeds)
        ]
        names = [SCORES.get(key, key) for key in results["by_seed"]]
        chapter.tables.append(Table(["seed", *names], rows_of_seeds, "Each seed with its own training subset."))
    yield chapter
    yield from validation_chapters(results)


def validation_chapters(results: Mapping[str, Any]) -> Iterator[Chapter]:
    """The validations of a probe that is trained, or the settings that a validation part chose from."""
    found, chapter = results.get("validation") or [], Chapter("Validation", is_grid=True)
    if results.get("best_head"):
        chapter.lines.append(f"Chosen: {shown(results['best_head'])}.")
    if results.get("chosen"):
        chapter.lines.append(f"Chosen: {', '.join(f'{name} {shown(value)}' for name, value in results['chosen'].items())}.")
    if found and "iteration" in found[0]:
        iterations = np.array([row["iteration"] for row in found], float)
        for key, title in (("auc", "AUC of the best head, validation"), ("loss", "loss of the best head, validation")):
            values = np.array([row[key] if is_number(row.get(key)) else math.nan for row in found])
            add_panel(chapter, CurvePanel(title, {key: Curve(iterations, values)}))
    elif found and "setting" in found[0]:
        ordered = sorted(found, key=lambda row: -row["score"] if is_number(row.get("score")) else math.inf)
        rows = [(row["setting"].strip("()").replace("'", ""), shown(row.get("score"), 4)) for row in ordered[:10]]
        what = "AUC" if "test_auc" in results else "minus mean absolute error"
        caption = f"The best {len(rows)} of {len(found)} settings on the validation part, by {what}."
        chapter.tables.append(Table(("setting", what), rows, caption))
    if chapter.lines or chapter.pictures or chapter.tables:
        yield chapter


def seed_chapter(path: Path) -> Chapter:
    """A seed of several, which has a folder of its own.

    Raises:
        BadInput: Its results are damaged.
    """
    with as_written(path):
        first, *_ = score_chapters(read_object(path))
    first.tables[0] = Table(first.tables[0].head, first.tables[0].rows, "")
    return Chapter(path.parent.name.replace("_", " ").capitalize(), tables=first.tables)


def run_chapter(decisive: Mapping[str, Any], log: Log, metrics: Rows) -> Chapter:
    """What decided the result, and how the run went."""
    rows = [(key, shown(value)) for key, value in decisive.items() if key not in LONG]
    chapter = Chapter(
        "What decided it", tables=[Table(("flag", "value"), rows, "Content by its SHA-256 in the place of names.")]
    )
    if log.skipped:
        lines = [f"{iteration:,}" for iteration, _ in log.skipped]
        chapter.lines.append(f"Steps skipped because the loss was not finite: iterations {', '.join(some(lines))}.")
    if log.stops:
        chapter.lines.append(f"Stopped after iteration {', '.join(f'{i:,}' for i, _ in log.stops)} and started again.")
    if metrics.is_cut:
        chapter.lines.append("The last line of the metrics was cut, by a kill or because it is being written: left out.")
    chapter.folded.extend((f"The {key}", str(decisive[key])) for key in LONG[1:] if decisive.get(key))
    return chapter


def probe_page(folder: Path) -> str:
    """The page of `dinov2 probe`.

    Raises:
        BadInput: It is not finished, or one of its files cannot be used.
    """
    decisive, results = read_object(folder / IDENTITY), read_object(folder / RESULTS)
    if not results:
        raise BadInput(f"{folder}: has no {RESULTS}, so the probe is not finished: start its command again")
    with as_written(folder / RESULTS):
        metrics = [name for name in PROBE_NAMES if name in results["scores"]["features"]]
        tables = [
            _probe_table(results["scores"], metrics, "Mean of the repeats, out of fold."),
            _probe_table(results["differences"], metrics, "Features minus each other, paired by person."),
        ]
        facts = [(name, shown(value)) for name, value in results.items() if not isinstance(value, dict)]
        classes = [f"{name} {count}" for name, count in (results.get("classes") or {}).items()]
        first = results["scores"]["features"][metrics[0]]
        tiles = [
            (shown(first["value"], 3), f"{PROBE_NAMES[metrics[0]]} of the features"),
            (_interval(first), "95 % interval"),
            (shown(results["people"]), "people"),
            (shown(results["scans"]), "scans"),
        ]
    pictures = [Picture((folder / n).read_bytes(), "As the probe drew it.") for n in _FIGURES if (folder / n).is_file()]
    chapters = [
        Chapter(
            f"{results['target']} by features", pictures=pictures, lines=[f"Classes: {', '.join(classes)}."] if classes else []
        ),
        Chapter("Scores", tables=tables, lines=[f"Intervals: {results.get('intervals', 'as results.json has them')}."]),
        Chapter("The question", tables=[Table(("", "value"), facts, "")]),
        run_chapter(decisive, Log(), Rows([], False)),
        environment_chapter(read_object(folder / RUN_FILE)),
    ]
    return figure_page(f"Probe {folder.resolve().name}", [f"Folder {folder.resolve()}."], chapters, tiles)


def _probe_table(scores: Mapping[str, Any], metrics: Sequence[str], caption: str) -> Table:
    """Models by metrics, each with its interval, and what a difference is read as."""
    rows = []
    for name, of in scores.items():
        cells = []
        for metric in metrics:
            interval = _interval(of[metric])
            reading = f": {of[metric]['reading']}" if "reading" in of[metric] else ""
            cells.append(f"{shown(of[metric]['value'], 3)} ({interval}){reading}")
        rows.append([name, *cells])
    return Table(["model", *(PROBE_NAMES[m] for m in metrics)], rows, caption)


def _interval(score: Mapping[str, Any]) -> str:
    return "no interval" if score.get("ci95") is None else " to ".join(shown(v, 3) for v in score["ci95"])
