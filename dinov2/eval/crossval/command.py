"""`dinov2 probe`: how well features tell a column of a table, beside simpler numbers, by repeated nested cross-validation.

Reading order: `probe` -> `open_question` (tables, join, target, what folds need) -> `inputs_of` (features and what they are
compared with) -> `cross_validate`, `summarise`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.downstream.stratify import MOST_CLASSES
from dinov2.errors import EXIT_OK, BadInput
from dinov2.eval.crossval.baselines import covariate_columns, volume_and_histogram
from dinov2.eval.crossval.joining import groups_of, join
from dinov2.eval.crossval.models import (
    OutOfFold,
    Splits,
    Target,
    as_linear_map,
    constant_model,
    cross_validate,
    inner_splits,
    linear_model,
    splits_of,
)
from dinov2.eval.crossval.scores import CHANCE, NAMES, mean_roc, metrics_of, summarise
from dinov2.eval.crossval.tables import PARTS, Embeddings, People, read_embeddings, read_people
from dinov2.files import path_for_list, path_in_list, read_json, write_json, write_text
from dinov2.logging import Say
from dinov2.logging.folder import locked_folder, refuse_another_programs_run
from dinov2.logging.progress import Progress
from dinov2.logging.provenance import RUN_FILE, run_record
from dinov2.optional import left_out

logger = logging.getLogger(__name__)

FEATURES = "features"
VOLUME = "volume"  # a covariate that is measured where the table has no such column
PART_CHOICES = (*PARTS, "+".join(PARTS))
IDENTITY, RESULTS, PREDICTIONS, PROBE = "decisive.json", "results.json", "predictions.csv", "probe.pth"
_ROC_POINTS = 401


@dataclass(frozen=True)
class ProbeRequest:
    """What is asked for.

    Attributes:
        features: The table of `dinov2 embed`.
        table: Of people.
        target: Its column that is to be told.
        output: The folder of everything that is written.
        group: Its column that says whose a scan is.
        covariates: Its columns that features are compared with, and joined to.
        key: Its column that names scans; None: found.
        task: `classification` or `regression`; None: by the target's values.
        parts: Of the features.
        untrained: Tables of the same scans by the same network with random weights.
        folds, repeats: Of the outer cross-validation.
        seed: Of the folds.
        reads_scans: Whether volume and histogram are measured.
    """

    features: Path
    table: Path
    target: str
    output: Path
    group: str | None = None
    covariates: tuple[str, ...] = ()
    key: str | None = None
    task: str | None = None
    parts: str = PART_CHOICES[-1]
    untrained: tuple[Path, ...] = ()
    folds: int = 5
    repeats: int = 5
    seed: int = 0
    reads_scans: bool = True


@dataclass(frozen=True)
class Question:
    """Joined scans and what is asked of them, in the order of the embeddings."""

    embeddings: Embeddings
    people: People
    rows: list[int]
    lines: list[int]
    target: Target

    @property
    def ids(self) -> list[str]:
        return [self.embeddings.ids[i] for i in self.rows]


def probe(request: ProbeRequest, say: Say) -> int:
    """Cross-validate, say and draw what it shows, save everything.

    Raises:
        BadInput: Tables, columns or output cannot be used.
    """
    question = open_question(request, say)
    untrained = [read_untrained(path, question) for path in request.untrained]
    identity = _identity(request, question, untrained)
    refuse_another_programs_run(request.output)
    if _is_done(request.output, identity):
        say(f"{request.output}: holds this probe already, finished; choose another --output to make it again")
        return EXIT_OK
    with locked_folder(request.output) as folder:
        inputs = inputs_of(request, question, untrained, say)
        target = question.target
        everyone = np.arange(len(target.values))
        folds = [splits_of(target, everyone, request.folds, request.seed + r) for r in range(request.repeats)]
        found = _cross_validate(inputs, target, folds)
        summary = summarise(found, FEATURES, target)
        record = run_record(question.embeddings.sha256, len(target.values), 0, {})
        write_json(folder / RUN_FILE, record)  # first: it tells the folder from another program's
        write_json(folder / IDENTITY, identity)
        model = linear_model(target, inner_splits(target, everyone, request.seed)).fit(inputs[FEATURES][0], target.values)
        save(folder / PROBE, question.embeddings, target, request.parts, *as_linear_map(model, inputs[FEATURES][0].shape[1]))
        write_text(folder / PREDICTIONS, predictions_csv(question, found))
        drawn = draw(folder, question, found, summary, request)
        write_json(folder / RESULTS, {**_about(request, question), **summary})  # last: where it is, all is there
        for line in lines_of(summary, target):
            say(line)
        say(f"{folder}: {', '.join([RESULTS, PREDICTIONS, *drawn, PROBE])} (`dinov2 classify --probe`)")
    return EXIT_OK


def open_question(request: ProbeRequest, say: Say) -> Question:
    """Read, join and check.

    Raises:
        BadInput: What cannot be used.
    """
    if request.folds < 3 or request.repeats < 1:
        raise BadInput(f"--folds {request.folds} --repeats {request.repeats}: give three folds or more, and a repeat or more")
    if request.parts not in PART_CHOICES:
        raise BadInput(f"--features {request.parts}: choose one of {', '.join(PART_CHOICES)}")
    embeddings, people = read_embeddings(request.features), read_people(request.table)
    people.require(request.target, "--target")
    for column in request.covariates:
        if column != VOLUME:
            people.require(column, "--covariates")
    if request.group:
        people.require(request.group, "--group")
    if request.target in (request.group, *request.covariates):
        flag = "--group" if request.target == request.group else "--covariates"
        raise BadInput(f"{flag} {request.target}: is the target, which would be told by itself: leave it out")
    rows, lines = join(embeddings, people, request.key, (request.target, *request.covariates), say)
    names, warnings = groups_of(embeddings, people, rows, lines, request.group)
    for warning in warnings:
        say(f"warning: {warning}")
    number_of: dict[str, int] = {}
    groups = np.array([number_of.setdefault(name, len(number_of)) for name in names])  # the file's order does not matter
    target = target_of(request, people, lines, groups)
    _require_enough(target, request)
    counts = Counter(target.classes[k] for k in target.values) if target.classes else {}
    what = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or (
        f"{target.values.min():g} to {target.values.max():g}, median {np.median(target.values):g}"
    )
    say(f"{target.name}: {what}; {len(rows)} scans of {len(number_of)} people")
    return Question(embeddings, people, rows, lines, target)


def target_of(request: ProbeRequest, people: People, lines: Sequence[int], groups: np.ndarray) -> Target:
    """The target's values: words are classes, and whole numbers of a few values that come twice on average.

    Raises:
        BadInput: A cell without a value, or no number where one is asked for.
    """
    cells = [people.value(line, request.target) for line in lines]
    numbers = [people.number(cell) for cell in cells]
    words = [i for i, number in enumerate(numbers) if number is None]
    different = set(numbers)
    few = len(different) <= min(MOST_CLASSES, len(cells) / 2) and all(n is not None and n.is_integer() for n in different)
    if request.task == "classification" or (request.task is None and (words or few)):
        classes = sorted(set(cells))
        return Target(request.target, np.array([classes.index(cell) for cell in cells]), classes, groups)
    if words:
        where = people.where(lines[words[0]])
        raise BadInput(f"{where}: {request.target} is {cells[words[0]]!r}, no number: correct it, or --task classification")
    return Target(request.target, np.array(numbers, float), [], groups)


def _require_enough(target: Target, request: ProbeRequest) -> None:
    """Raise `BadInput` where folds cannot be made."""
    num_people = len(set(target.groups.tolist()))
    if num_people < request.folds:
        raise BadInput(f"{num_people} people are fewer than {request.folds} folds: give a smaller --folds, or more people")
    if not target.classes:
        if np.ptp(target.values) == 0:
            raise BadInput(f"--target {target.name}: every value is {target.values[0]:g}: there is nothing to tell")
        return
    if len(target.classes) < 2:
        raise BadInput(f"--target {target.name}: everybody is {target.classes[0]}: there is nothing to tell")
    people = {name: len(set(target.groups[target.values == k].tolist())) for k, name in enumerate(target.classes)}
    rarest = min(people, key=lambda name: people[name])
    if people[rarest] < request.folds:
        advice = "or --task regression" if len(people) > MOST_CLASSES else "or leave the class out of the table"
        raise BadInput(
            f"--target {target.name}: {rarest} is the class of {people[rarest]} people, fewer than {request.folds} folds: "
            f"give a smaller --folds, {advice}"
        )


def read_untrained(path: Path, question: Question) -> np.ndarray:
    """Features [n, all parts] of the same scans by the same network, untrained, in the question's order.

    Raises:
        BadInput: The table is of a trained network, another view or other scans.
    """
    table, of = read_embeddings(path), question.embeddings
    told = [] if table.about.get("untrained") is not None else ["is not of an untrained network"]
    told += [] if table.view == of.view else [f"was made with {table.view}, {of.path} with {of.view}"]
    student = [(about.get("config") or {}).get("student") for about in (table.about, of.about)]
    told += ["is of another network"] if all(student) and student[0] != student[1] else []
    place = {key: i for i, key in enumerate(zip(table.shas, table.ids, strict=True))}
    wanted = [(of.shas[i], of.ids[i]) for i in question.rows]
    missing = [name for sha, name in wanted if (sha, name) not in place]
    told += [f"has no scan {missing[0]}"] if missing else []
    if told:
        raise BadInput(f"--untrained {path}: {told[0]}: make it by `dinov2 embed --untrained SEED`, else as {of.path}")
    return np.concatenate([table.features[part] for part in PARTS], axis=1)[[place[key] for key in wanted]]


def inputs_of(
    request: ProbeRequest, question: Question, untrained: Sequence[np.ndarray], say: Say
) -> dict[str, list[np.ndarray]]:
    """What each model sees, [n, F] of each network, by the names of the table; the constant one sees zeros.

    Raises:
        BadInput: A covariate has no value, or is the volume of scans that cannot be read.
    """
    features = question.embeddings.columns(request.parts)[question.rows]
    inputs = {FEATURES: [features]}
    if untrained:
        half = untrained[0].shape[1] // len(PARTS)
        taken = np.concatenate([np.arange(half) + half * PARTS.index(part) for part in request.parts.split("+")])
        inputs[f"untrained network ({len(untrained)} seed{'s' * (len(untrained) > 1)})"] = [x[:, taken] for x in untrained]
    measured, missing = np.empty((0, 0)), "--no-scans"
    if request.reads_scans:
        measured, unread = volume_and_histogram([question.embeddings.scans[i] for i in question.rows])
        missing = unread or ""
    if not missing:
        inputs |= {"volume": [measured[:, :1]], "volume and histogram": [measured]}
    elif request.reads_scans:
        say(f"warning: without volume and histogram: {missing}")
    if request.covariates:
        columns = []
        for name in request.covariates:
            if name == VOLUME and VOLUME not in question.people.columns:
                if missing:
                    raise BadInput(f"--covariates {VOLUME}: cannot be measured: {missing}")
                columns.append(measured[:, :1])
            else:
                columns.append(covariate_columns(question.people, question.lines, name))
        covariates = np.concatenate(columns, axis=1)
        names = ", ".join(request.covariates)
        inputs |= {names: [covariates], f"features, {names}": [np.concatenate([features, covariates], axis=1)]}
    constant = "majority" if question.target.classes else "median"
    return {**inputs, constant: [np.zeros((len(features), 1))]}


def _cross_validate(inputs: dict[str, list[np.ndarray]], target: Target, folds: Sequence[Splits]) -> dict[str, OutOfFold]:
    num_fits = sum(len(networks) for networks in inputs.values()) * sum(map(len, folds))
    found = {}
    with Progress(num_fits, "fits") as progress:
        for name, networks in inputs.items():
            make = constant_model if not any(x.any() for x in networks) else linear_model
            found[name] = cross_validate(make, networks, target, folds, progress.update)
    return found


def save(path: Path, embeddings: Embeddings, target: Target, parts: str, weight: np.ndarray, bias: np.ndarray) -> None:
    """The probe on features, fitted on everybody, as `dinov2 classify` opens it."""
    from dinov2.eval.probing.embedding_probe import save_embedding_probe  # here: torch, which the work before does not need

    about, weights = embeddings.about, embeddings.about.get("weights")
    if weights:
        place = path_in_list(weights, embeddings.path.parent)
        weights = path_for_list(place, path.parent) if os.path.exists(place) else weights
    meta = {
        "target": target.name,
        "classes": target.classes,
        "parts": parts.split("+"),
        "view": embeddings.view,
        "network": embeddings.network,
        "weights": weights,
        **{name: about.get(name) for name in ("untrained", "dtype", "config", "licence", "encoder")},
    }
    save_embedding_probe(path, weight, bias, meta)


def predictions_csv(question: Question, found: dict[str, OutOfFold]) -> str:
    """A line a scan: its person, target, and each model's out-of-fold prediction, the mean of the repeats."""
    target, text = question.target, io.StringIO()
    shown = range(1, 2) if len(target.classes) == 2 else range(max(1, len(target.classes)))
    ending = {k: f": p({target.classes[k]})" if target.classes else "" for k in shown}
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "person", target.name, *(f"{name}{ending[k]}" for name in found for k in shown)])
    means = {name: one.predicted.mean(0) for name, one in found.items()}
    for i, name in enumerate(question.ids):
        label = target.classes[target.values[i]] if target.classes else f"{target.values[i]:g}"
        writer.writerow([name, target.groups[i], label, *(f"{mean[i, k]:.6g}" for mean in means.values() for k in shown)])
    return text.getvalue()


def draw(
    folder: Path, question: Question, found: dict[str, OutOfFold], summary: dict[str, Any], request: ProbeRequest
) -> list[str]:
    """`roc.png` or `scatter.png`, with a PDF beside it; their names, none where there is nothing to draw with."""
    note = left_out("pictures", "matplotlib")
    if note is not None:
        logger.warning("%s", note)
        return []
    from dinov2.visual.probe import draw_roc, draw_scatter  # here: matplotlib takes a second

    target = question.target
    metric = metrics_of(target)[0]
    scores = {name: (one[metric]["value"], one[metric]["ci95"]) for name, one in summary["scores"].items()}
    people = len(set(target.groups.tolist()))
    how = f"{people} people, {request.folds} folds, {request.repeats} repeat{'s' * (request.repeats > 1)}"
    if not target.classes:
        predicted = found[FEATURES].predicted[..., 0].mean(0)
        median = float(np.median(target.values))
        draw_scatter(
            target.values, predicted, scores, median, f"{target.name} by {FEATURES}: {how}", target.name, folder / "scatter.png"
        )
        return ["scatter.png", "scatter.pdf"]
    grid = np.linspace(0, 1, _ROC_POINTS)
    shown = range(1, 2) if len(target.classes) == 2 else range(len(target.classes))
    curves = {
        f"{target.classes[k]} against {target.classes[1 - k] if len(target.classes) == 2 else 'the rest'}": {
            name: mean_roc(one, target, k, grid) for name, one in found.items()
        }
        for k in shown
    }
    draw_roc(grid, curves, scores, CHANCE["auc"], f"{target.name} by {FEATURES}: {how}", folder / "roc.png")
    return ["roc.png", "roc.pdf"]


def lines_of(summary: dict[str, Any], target: Target) -> list[str]:
    """The table, and in words what it shows."""
    metrics, scores = metrics_of(target), summary["scores"]
    width = max(map(len, scores))
    lines = ["", f"{'':{width}}  " + "  ".join(f"{NAMES[m]:28}" for m in metrics).rstrip()]
    lines += [f"{name:{width}}  " + "  ".join(f"{_shown(one[m]):28}" for m in metrics).rstrip() for name, one in scores.items()]
    lines += ["", f"features minus each other, {NAMES[metrics[0]]}, paired by person:"]
    for name, one in summary["differences"].items():
        lines.append(f"{name:{width}}  {_shown(one[metrics[0]], sign='+'):28}  {one[metrics[0]]['reading']}")
    return [*lines, "", verdict(summary, target)]


def verdict(summary: dict[str, Any], target: Target) -> str:
    """One sentence: what the features know, and what they are ahead of."""
    metric = metrics_of(target)[0]
    found: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
    for name, one in summary["differences"].items():
        found[one[metric]["reading"]].append(name)
    ways = {"better": "better than", "worse": "worse than", "not told apart": "not told apart from"}
    words = [f"{ways[how]} {' and '.join(map(repr, names))}" for how, names in found.items() if names]
    return f"{target.name}, {NAMES[metric]} {_shown(summary['scores'][FEATURES][metric])}: the features are {', '.join(words)}."


def _shown(one: dict[str, Any], sign: str = "") -> str:
    interval = "no interval" if one["ci95"] is None else " to ".join(f"{v:{sign}.3f}" for v in one["ci95"])
    return f"{one['value']:{sign}.3f} ({interval})"


def _about(request: ProbeRequest, question: Question) -> dict[str, Any]:
    target = question.target
    return {
        "target": target.name,
        "task": "classification" if target.classes else "regression",
        "classes": {name: int((target.values == k).sum()) for k, name in enumerate(target.classes)},
        "scans": len(question.rows),
        "people": len(set(target.groups.tolist())),
        "scans_in_table": len(question.embeddings.ids),
        "lines_in_table": len(question.people.lines),
        "features": request.parts,
        "folds": request.folds,
        "repeats": request.repeats,
        "seed": request.seed,
        "intervals": "95 %, percentiles of 2,000 bootstrap draws of people of out-of-fold predictions; models not fitted again",
    }


def _identity(request: ProbeRequest, question: Question, untrained: Sequence[np.ndarray]) -> dict[str, Any]:
    """What decides the result, in plain types: content in the place of the names of files."""
    return {
        "program": "probe",
        "features": question.embeddings.sha256,
        "table": hashlib.sha256(request.table.read_bytes()).hexdigest(),
        "untrained": [hashlib.sha256(values.tobytes()).hexdigest() for values in untrained],
        "covariates": list(request.covariates),
        **{name: getattr(request, name) for name in ("target", "group", "key", "task", "parts")},
        **{name: getattr(request, name) for name in ("folds", "repeats", "seed", "reads_scans")},
    }


def _is_done(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds this probe, finished.

    Raises:
        BadInput: It holds another run.
    """
    path = folder / IDENTITY
    if not path.exists():
        return False
    before = read_json(path, remedy="use another --output")
    before = before if isinstance(before, dict) else {}
    other = sorted(name for name in before.keys() | identity.keys() if before.get(name) != identity.get(name))
    if other:
        raise BadInput(f"{folder}: holds a run with another {', '.join(other)}: use another --output, or remove the folder")
    return (folder / RESULTS).exists()
