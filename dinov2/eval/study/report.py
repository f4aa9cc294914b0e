"""A study's headline numbers, from its table of runs: means, gains, label equivalence; beside the paper's where it says some.

A method's value is the mean of its runs, of the Dice of a segmentation (without the background) or the AUC of a classification.
A gain is relative: per cent of the other's value. Label equivalence: the smallest share of the training part with which the
subject is as good as another method with all of it, by linear interpolation between the shares that were run.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

from dinov2.errors import EXIT_OK
from dinov2.eval.study import paper
from dinov2.eval.study.cells import labelled_sets
from dinov2.eval.study.differences import TABLE as COMPARISON
from dinov2.eval.study.differences import differences, significance, write_differences
from dinov2.eval.study.plan import aligned
from dinov2.eval.study.schema import Study
from dinov2.eval.study.table import MEAN, read_table
from dinov2.files import write_text
from dinov2.logging import Say

PRIMARY = ("dice", "auc")  # the metric that a data set's numbers are of
TESTED = ("dice", "hd95_mm", "auc", "f1")  # the metrics that the paper tests
WHOLE = 100
Values = dict[str, dict[float, float]]  # by method, then percent


@dataclass(frozen=True)
class Headline:
    """A line of a report.

    Attributes:
        dataset: Of the study.
        percent: Of the training part; None: of all.
        kind: One of `paper`'s.
        method: Whose.
        against: The method that it is held against; empty where none.
        metric: What its values are of.
        value: The method's, or the percentage of a label equivalence; None: none.
        other: The other method's value.
        gain_percent: Relative.
        note: What else is to be said.
        paper: The paper's number, as it has it.
        place: Where.
        label: Class that it is of; empty: the mean of all.
    """

    dataset: str
    percent: float | None
    kind: str
    method: str
    against: str
    metric: str
    value: float | None
    other: float | None = None
    gain_percent: float | None = None
    note: str = ""
    paper: str = ""
    place: str = ""
    label: str = ""


def report(study: Study, say: Say) -> int:
    """Say the headline numbers and write `headline.csv`.

    Raises:
        BadInput: There is no table of runs.
    """
    rows = read_table(study, "runs")
    lines = [_beside_paper(study, line) for name in study.datasets for line in headlines(study, name, rows)]
    found = differences(study, {name: labelled.recipe for name, labelled in labelled_sets(study).items()})
    for text in aligned([("data set", "%", "what", "of", "against", "value", "other", "gain %", "paper"), *map(_words, lines)]):
        say(text.rstrip())
    for note in dict.fromkeys(line.note for line in lines if line.note):
        say(note)
    if study.paper:
        say("paper: its words in the places that headline.csv names; its Dice counts the background, ours does not")
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(Headline)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in asdict(line).items()} for line in lines)
    write_text(study.output / "headline.csv", out.getvalue())
    write_differences(study, found)
    shown = list(significance(found, TESTED))
    if shown:
        head = ("data set", "%", "metric", "difference", "mean", "95 % bootstrap", "p", "p (Holm)", "note")
        for text in aligned([head, *shown]):
            say(text.rstrip())
        say("p: Wilcoxon's test of test cases (segmentation), Welch's of seeds (classification); Holm's within a metric")
    say(f"{study.output / 'headline.csv'}, {COMPARISON}: written")
    return EXIT_OK


def headlines(study: Study, dataset: str, rows: Sequence[dict[str, Any]]) -> Iterator[Headline]:
    """The lines of a data set; none where it has no runs."""
    of_any_class = [r for r in rows if r["dataset"] == dataset and r["metric"] in PRIMARY]
    of_it = [r for r in of_any_class if r["class"] == MEAN]
    if not of_it:
        return
    metric = of_it[0]["metric"]
    values, notes = _means(study, of_it)
    subject = study.first_method
    for percent in study.dataset(dataset).shares:
        for method in study.methods:
            if percent in values.get(method, {}):
                note = notes.get((method, percent), "")
                yield Headline(dataset, percent, paper.VALUE, method, "", metric, values[method][percent], note=note)
    yield from _gains(study, dataset, metric, subject, values)
    for label in dict.fromkeys(r["class"] for r in of_any_class if r["class"] != MEAN):
        of_class, _ = _means(study, [r for r in of_any_class if r["class"] == label])
        gains = _gains(study, dataset, metric, subject, of_class)
        yield from (replace(line, label=label) for line in gains if line.kind == paper.MEAN_NEXT_BEST)
    yield from _equivalence(dataset, metric, subject, values)


def _means(study: Study, rows: Sequence[dict[str, Any]]) -> tuple[Values, dict[tuple[str, float], str]]:
    """Mean over runs by method and percent, and a note where runs are missing."""
    runs: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row["value"] is not None:
            runs.setdefault((row["method"], row["percent"]), []).append(row["value"])
    values: Values = {}
    for (method, percent), found in runs.items():
        values.setdefault(method, {})[percent] = sum(found) / len(found)
    dataset, wanted = rows[0]["dataset"], len(study.seeds_of(rows[0]["dataset"]))
    notes = {
        key: f"{dataset}, {key[1]} %, {key[0]}: {len(found)} of {wanted} runs"
        for key, found in runs.items()
        if len(found) < wanted
    }
    return values, notes


def _gains(study: Study, dataset: str, metric: str, subject: str, values: Values) -> Iterator[Headline]:
    """Over the next best and over the baseline: at every percentage, then the mean and the largest."""
    own = values.get(subject, {})
    over_next: list[float] = []
    over_baseline: list[float] = []
    for percent, value in sorted(own.items()):
        others = {m: of[percent] for m, of in values.items() if m != subject and percent in of}
        if others:
            best = max(others, key=lambda m: others[m])
            line = _gain(dataset, percent, paper.NEXT_BEST, subject, best, metric, value, others[best])
            over_next += [] if line.gain_percent is None else [line.gain_percent]
            yield line
        if study.baseline in others:
            line = _gain(dataset, percent, paper.BASELINE, subject, study.baseline, metric, value, others[study.baseline])
            over_baseline += [] if line.gain_percent is None else [line.gain_percent]
            yield line
    yield from _others_gain(dataset, metric, values)
    if over_next:
        gain = sum(over_next) / len(over_next)
        yield Headline(dataset, None, paper.MEAN_NEXT_BEST, subject, "", metric, None, gain_percent=gain)
    if over_baseline:
        gain = max(over_baseline)
        yield Headline(dataset, None, paper.MOST_BASELINE, subject, study.baseline, metric, None, gain_percent=gain)


def _others_gain(dataset: str, metric: str, values: Values) -> Iterator[Headline]:
    """What pretraining gains the Swin transformer, which the paper holds beside its own gain: the largest of the fractions."""
    pretrained, scratch = values.get("SwinTransfer", {}), values.get("SwinRandom", {})
    gains = [100 * (pretrained[p] / scratch[p] - 1) for p in pretrained if scratch.get(p, 0) > 0]
    if gains:
        yield Headline(dataset, None, paper.MOST_BASELINE, "SwinTransfer", "SwinRandom", metric, None, gain_percent=max(gains))


def _gain(
    dataset: str, percent: float, kind: str, subject: str, against: str, metric: str, value: float, other: float
) -> Headline:
    gain = 100 * (value / other - 1) if other > 0 else None
    return Headline(dataset, percent, kind, subject, against, metric, value, other, gain)


def _equivalence(dataset: str, metric: str, subject: str, values: Values) -> Iterator[Headline]:
    """Against each of the others with all labels, the best first."""
    others = {m: of[WHOLE] for m, of in values.items() if m != subject and WHOLE in of}
    own = values.get(subject, {})
    for other in sorted(others, key=lambda m: -others[m]) if own else []:
        percent, how = label_equivalence(own, others[other])
        where = f"{dataset}: {subject} is as good as {other} with 100 %"
        note = f"{where} {how}" if percent is None else f"{where} at {how} {percent:.3g} % of the labels"
        yield Headline(dataset, None, paper.EQUIVALENCE, subject, other, metric, percent, others[other], note=note)


def label_equivalence(own: dict[float, float], target: float) -> tuple[float | None, str]:
    """The smallest share of labels (per cent) with which a method reaches a value, and how that is known.

    Args:
        own: Its value by per cent.
        target: The value to reach, larger being better.
    """
    curve = sorted(own.items())
    if curve[0][1] >= target:
        return float(curve[0][0]), "the smallest share that was run,"
    for (low, below), (high, above) in pairwise(curve):
        if below < target <= above:
            return low + (target - below) / (above - below) * (high - low), "(by linear interpolation)"
    return None, "at no share that was run"


def _beside_paper(study: Study, line: Headline) -> Headline:
    """A line with the paper's number, where it has one."""
    recipe = study.dataset(line.dataset).recipe or line.dataset
    found = paper.said(study.paper, recipe, line.percent, line.kind, line.method, line.label)
    return line if found is None else replace(line, paper=found.text, place=found.place)


def _words(line: Headline) -> tuple[str, ...]:
    """A line of the text."""
    is_share = line.kind == paper.EQUIVALENCE
    value = "" if line.value is None else f"{line.value:.3g} %" if is_share else f"{line.value:.4f}"
    other = "" if line.other is None else f"{line.other:.4f}"
    gain = "" if line.gain_percent is None else f"{line.gain_percent:+.1f}"
    percent = "" if line.percent is None else str(line.percent)
    kind = f"{line.kind}: {line.label}" if line.label else line.kind
    return (line.dataset, percent, kind, line.method, line.against, value, other, gain, line.paper)
