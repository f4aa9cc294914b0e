"""Scores of out-of-fold predictions, for the people as they are and for draws of them.

n rows, K classes, R runs (repeats), D draws. A draw is how often each row counts, [D, n].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dinov2.eval.crossval.models import OutOfFold, Target
from dinov2.eval.metrics.statistics import drawn_counts, percentile_interval

NAMES = {"auc": "AUC", "balanced_accuracy": "balanced accuracy", "mae": "mean absolute error", "r2": "R2"}
CHANCE = {"auc": 0.5, "r2": 0.0}
SMALLER_IS_BETTER = ("mae",)


def metrics_of(target: Target) -> tuple[str, ...]:
    """The first one is the one that is drawn and told first."""
    return ("auc", "balanced_accuracy") if target.classes else ("mae", "r2")


def score(metric: str, found: OutOfFold, target: Target, counts: np.ndarray) -> np.ndarray:
    """A metric of each draw [D]: the mean of the runs'; NaN where it cannot be computed."""
    with np.errstate(invalid="ignore", divide="ignore"):
        if metric == "auc":
            return auc(found, target, counts)
        if metric == "balanced_accuracy":
            right = (found.predicted.argmax(-1) == target.values).mean(0)  # [n]
            of_class = [counts * (target.values == k) for k in range(len(target.classes))]
            return np.mean([(some @ right) / some.sum(1) for some in of_class], axis=0)
        error = found.predicted[..., 0] - target.values  # [R, n]
        total = counts.sum(1)
        if metric == "mae":
            return counts @ np.abs(error).mean(0) / total
        mean = counts @ target.values / total
        return 1 - (counts @ (error**2).mean(0)) / (counts @ target.values**2 - total * mean**2)


def auc(found: OutOfFold, target: Target, counts: np.ndarray) -> np.ndarray:
    """Share of pairs of the same test fold, one of the class and one not, that are in the right order; mean of the classes.

    Pairs of two folds are not compared: two models said these, and the one that saw fewer of a class tends to be tested on more
    of it, which takes pooled predictions below one half where nothing is known.
    """
    classes = range(1, 2) if len(target.classes) == 2 else range(len(target.classes))
    values = []
    for k in classes:
        right, pairs = np.zeros(len(counts)), np.zeros(len(counts))
        for predicted, fold in zip(found.predicted[..., k], found.fold, strict=True):
            for number in np.unique(fold):
                rows = fold == number
                r, p = _ordered_pairs(predicted[rows], target.values[rows] == k, counts[:, rows])
                right, pairs = right + r, pairs + p
        values.append(right / pairs)
    return np.mean(values, axis=0)


def _ordered_pairs(values: np.ndarray, is_class: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs in the right order (equal ones are half) and all pairs, of each draw [D]."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf) > 0)  # of equal values
    of, other = (np.add.reduceat((counts * side)[:, order], starts, axis=1) for side in (is_class, ~is_class))
    below = other.cumsum(1) - other / 2
    return (of * below).sum(1), of.sum(1) * other.sum(1)


def summarise(found: dict[str, OutOfFold], subject: str, target: Target) -> dict[str, Any]:
    """Every model's scores and the subject's differences from the others, with 95 % intervals, as JSON types.

    People are drawn, with all of their rows, the same ones for all models; models are not fitted again.
    """
    counts = drawn_counts(target.groups.tolist())
    everyone = np.ones((1, len(target.values)))
    scores: dict[str, Any] = {name: {} for name in found}
    differences: dict[str, Any] = {name: {} for name in found if name != subject}
    for metric in metrics_of(target):
        values = {name: float(score(metric, one, target, everyone)[0]) for name, one in found.items()}
        draws = {name: score(metric, one, target, counts) for name, one in found.items()}
        for name, one in found.items():
            runs = [OutOfFold(one.predicted[[r]], one.fold[[r]]) for r in range(len(one.fold))]
            scores[name][metric] = {
                "value": values[name],
                "ci95": percentile_interval(draws[name]),
                "runs": [float(score(metric, run, target, everyone)[0]) for run in runs],
            }
            if name != subject:
                difference = values[subject] - values[name]
                ci95 = percentile_interval(draws[subject] - draws[name])
                differences[name][metric] = {"value": difference, "ci95": ci95, "reading": reading(metric, ci95)}
    return {"scores": scores, "differences": differences}


def reading(metric: str, ci95: Sequence[float] | None) -> str:
    """What an interval of a difference from another model shows."""
    if ci95 is None or ci95[0] <= 0 <= ci95[1]:
        return "not told apart"
    return "better" if (ci95[0] > 0) != (metric in SMALLER_IS_BETTER) else "worse"


def mean_roc(found: OutOfFold, target: Target, k: int, grid: np.ndarray) -> np.ndarray:
    """Sensitivity at each share of false alarms: the folds' mean, weighted by pairs, whose area is the AUC."""
    total, pairs = np.zeros(len(grid)), 0
    for predicted, fold in zip(found.predicted[..., k], found.fold, strict=True):
        for number in np.unique(fold):
            rows = fold == number
            is_class = target.values[rows] == k
            num = int(is_class.sum() * (~is_class).sum())
            if num:
                total, pairs = total + num * _roc(predicted[rows], is_class, grid), pairs + num
    return total / max(pairs, 1)


def _roc(values: np.ndarray, is_class: np.ndarray, grid: np.ndarray) -> np.ndarray:
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(is_class, values, drop_intermediate=False)
    return np.interp(grid, false, true)  # at a step the upper end
