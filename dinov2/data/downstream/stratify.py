"""Parts and folds of cases with the same shares of labels in each, a patient's cases together (`StratifiedGroupKFold`).

A number's labels are alike where their quantile bins are. Every cut depends on the seed and the cases, never on their order.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dinov2.data.downstream.lists import SPLITS
from dinov2.data.downstream.split import Row, counts_of_fractions
from dinov2.errors import BadInput

MOST_CLASSES = 20  # whole numbers of more values than this are a regression's
MOST_BINS = 10
FINEST = 20  # folds that a part is put together from, where its share asks for no more


class _Case(NamedTuple):
    row: Row
    patient: str
    label: float | str  # of a regression, or a class; the same one where cases are not told apart


def stratified_parts(rows: Sequence[Row], fractions: Sequence[float], seed: int) -> dict[str, list[Row]]:
    """Training, validation and test with the same shares of labels.

    Args:
        rows: Items with `case`, `patient` and `label`, a value.
        fractions: Of the three, of the cases; as near as whole patients allow.
        seed: Of the patients' order.

    Raises:
        BadInput: Fractions that do not add up to 1, or too few patients.
    """
    counts_of_fractions(len({row["patient"] for row in rows}), fractions)
    test, rest = _take(_cases(rows, by_label=True), fractions[2], seed, parts_left=2)
    validation, training = _take(rest, fractions[1] / (fractions[0] + fractions[1]), seed, parts_left=1)
    parts = zip(SPLITS, (training, validation, test), strict=True)
    return {split: [case.row for case in cases] for split, cases in parts}


def fold_parts(rows: Sequence[Row], num_folds: int, seed: int, by_label: bool) -> list[dict[str, list[Row]]]:
    """Parts for each of several folds: fold i is tested, the next one (after the last the first) validates, the others train.

    So each case is tested once, and validates once.

    Args:
        rows: Items with `case` and `patient`.
        num_folds: At least three.
        seed: Of the patients' order.
        by_label: Labels are values, and their shares the same in every fold.

    Raises:
        BadInput: Fewer than three folds, or fewer patients than folds.
    """
    num_patients = len({row["patient"] for row in rows})
    if not 3 <= num_folds <= num_patients:
        raise BadInput(f"--folds {num_folds}: give from 3 to the number of patients, {num_patients}")
    folds = [[case.row for case in fold] for fold in _cut(_cases(rows, by_label), num_folds, seed)]
    return [
        {
            "training": [row for k, fold in enumerate(folds) if k not in (i, (i + 1) % num_folds) for row in fold],
            "validation": folds[(i + 1) % num_folds],
            "test": folds[i],
        }
        for i in range(num_folds)
    ]


def _cases(rows: Sequence[Row], by_label: bool) -> list[_Case]:
    """In an order of their own."""
    ordered = sorted(rows, key=lambda row: str(row["case"]))
    labels = _labels([row["label"] for row in ordered]) if by_label else [""] * len(ordered)
    return [_Case(row, str(row["patient"]), label) for row, label in zip(ordered, labels, strict=True)]


def _labels(given: Sequence[Any]) -> Sequence[float | str]:
    """Numbers of a regression, or the names of classes: words, and whole numbers of a few values that come again."""
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in given):
        return [str(value) for value in given]
    values = [float(value) for value in given]
    different = set(values)
    few = len(different) <= min(MOST_CLASSES, len(values) / 2)
    return [str(value) for value in values] if few and all(value.is_integer() for value in different) else values


def _take(cases: list[_Case], share: float, seed: int, parts_left: int) -> tuple[list[_Case], list[_Case]]:
    """A share of the cases, made of the folds that are most like the whole in size and labels; and the rest."""
    taken, num_folds = _folds_of_share(share, len({case.patient for case in cases}), parts_left)
    folds = _cut(cases, num_folds, seed)
    strata = dict(zip([case.row["case"] for case in cases], _strata(cases, num_folds), strict=True))
    whole = Counter(strata.values())

    def unlikeness(fold: list[_Case]) -> tuple[int, float]:
        counts = Counter(strata[case.row["case"]] for case in fold)
        absent = len(whole) - len(counts)  # first: without a class a part cannot be scored
        return absent, sum(abs(counts[stratum] * num_folds / total - 1) for stratum, total in whole.items())

    folds.sort(key=unlikeness)
    return _joined(folds[:taken]), _joined(folds[taken:])


def _joined(folds: Sequence[list[_Case]]) -> list[_Case]:
    return sorted((case for fold in folds for case in fold), key=lambda case: str(case.row["case"]))


def _folds_of_share(share: float, num_patients: int, parts_left: int) -> tuple[int, int]:
    """How many folds of how many come nearest to a share; as few as do, and one stays for each part that is left."""

    def taken(num_folds: int) -> int:
        return min(max(1, round(share * num_folds)), num_folds - parts_left)

    most = min(max(FINEST, round(1 / share)), num_patients)
    num_folds = min(range(1 + parts_left, most + 1), key=lambda n: (round(abs(taken(n) / n - share), 6), n))
    return taken(num_folds), num_folds


def _cut(cases: Sequence[_Case], num_folds: int, seed: int) -> list[list[_Case]]:
    """Folds of about equal size, with the same shares of labels."""
    from sklearn.model_selection import StratifiedGroupKFold  # here, because it takes seconds that most splits need not wait

    num_cases = Counter(case.patient for case in cases)
    patients = sorted(num_cases)
    random.Random(seed).shuffle(patients)
    place = {patient: i for i, patient in enumerate(sorted(patients, key=lambda patient: -num_cases[patient]))}
    strata = _strata(cases, num_folds)
    # folds of which no class has a case for each are refused there; with every case taken often enough the shares are the same
    times = math.ceil(num_folds / max(Counter(strata).values()))
    groups = np.repeat([place[case.patient] for case in cases], times)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a class with fewer cases than folds
        found = list(StratifiedGroupKFold(num_folds).split(groups, np.repeat(strata, times), groups))
    return [[case for case in cases if place[case.patient] in chosen] for chosen in (set(groups[test]) for _, test in found)]


def _strata(cases: Sequence[_Case], num_folds: int) -> list[int]:
    """Of each case the number of its class, or of its quantile bin; a bin has a case for each fold."""
    labels = np.array([case.label for case in cases])
    if labels.dtype.kind != "f":
        return np.unique(labels, return_inverse=True)[1].tolist()
    num_bins = min(max(1, len(cases) // num_folds), MOST_BINS)
    edges = np.unique(np.quantile(labels, np.linspace(0, 1, num_bins + 1)[1:-1]))
    return np.digitize(labels, edges).tolist()
