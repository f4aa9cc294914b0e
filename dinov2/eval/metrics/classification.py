"""Scores of class probabilities: AUC one-vs-rest, F1, balanced accuracy, confusion matrix, calibration; and those of numbers.

n cases, K classes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.eval.metrics.statistics import bootstrap_interval
from dinov2.files import write_text

CALIBRATION_BINS = 15


def auc_per_class(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class against the rest, by ranks; ties count half.

    Args:
        scores: [..., n, K]; any leading axes, such as heads.
        labels: [n] int.

    Returns:
        [..., K]; NaN for a class that no case has or all have, and where a score is not finite.
    """
    from scipy.stats import rankdata  # here: it takes a second, which a command that ends before it need not wait

    ranks = rankdata(scores, axis=-2)
    is_class = labels[:, None] == np.arange(scores.shape[-1])  # [n, K]
    num = is_class.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        auc = ((ranks * is_class).sum(-2) - num * (num + 1) / 2) / (num * (len(labels) - num))
    return np.where(np.isfinite(scores).all(-2), auc, np.nan)


def confusion(labels: np.ndarray, guess: np.ndarray, num_classes: int) -> np.ndarray:
    """[K, K] counts: rows are true classes, columns guessed ones."""
    return np.bincount(labels * num_classes + guess, minlength=num_classes**2).reshape(num_classes, num_classes)


def macro_f1(table: np.ndarray) -> float:
    """Mean over classes of F1, 0 for a class that is neither there nor guessed, of a confusion matrix."""
    return float((2 * table.diagonal() / np.maximum(table.sum(0) + table.sum(1), 1)).mean())


def balanced_accuracy(table: np.ndarray) -> float:
    """Mean over classes of the recall; NaN where a class has no case."""
    num = table.sum(1)
    return float((table.diagonal() / num).mean()) if num.all() else np.nan


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error: gap of confidence and accuracy, over equal bins of the confidence, weighted by cases."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [abs((confidence - correct)[bins == b].sum()) for b in range(CALIBRATION_BINS)]
    return float(sum(gaps) / len(labels))


def classification_scores(probabilities: np.ndarray, labels: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    """Everything that a test of classes reports, as JSON types.

    Args:
        probabilities: [n, K], rows that sum to 1.
        labels: [n] int.
        groups: Patient (or case) of each row: what the bootstrap draws.
    """
    guess, num_classes = probabilities.argmax(1), probabilities.shape[1]
    auc = auc_per_class(probabilities, labels)

    def of(rows: np.ndarray) -> list[float]:
        table = confusion(labels[rows], guess[rows], num_classes)
        return [auc_per_class(probabilities[rows], labels[rows]).mean(), macro_f1(table), balanced_accuracy(table)]

    intervals = bootstrap_interval(of, groups)
    names = ("test_auc", "test_f1", "test_balanced_accuracy")
    return {
        **{name: float(value) for name, value in zip(names, of(np.arange(len(labels))), strict=True)},
        **{f"{name}_ci95": interval for name, interval in zip(names, intervals, strict=True)},
        "test_auc_per_class": auc.tolist(),
        "test_calibration_error": calibration_error(probabilities, labels),
        "confusion_matrix": confusion(labels, guess, num_classes).tolist(),
    }


def regression_scores(predicted: np.ndarray, values: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    """Mean absolute error and Pearson's r of predicted numbers [n]; r is NaN where either is constant."""

    def of(rows: np.ndarray) -> list[float]:
        one, other = predicted[rows], values[rows]
        constant = np.ptp(one) == 0 or np.ptp(other) == 0
        return [float(np.abs(one - other).mean()), np.nan if constant else float(np.corrcoef(one, other)[0, 1])]

    mae, r = of(np.arange(len(values)))
    mae_interval, r_interval = bootstrap_interval(of, groups)
    return {"test_mae": mae, "test_mae_ci95": mae_interval, "test_r": r, "test_r_ci95": r_interval}


def write_predictions(path: str | Path, cases: Sequence[str], labels: Sequence[Any], columns: dict[str, np.ndarray]) -> None:
    """`predictions.csv`: case, label and a column of numbers for each name. Written aside and renamed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "label", *columns])
    for i, (case, label) in enumerate(zip(cases, labels, strict=True)):
        writer.writerow([case, label, *(f"{values[i]:.6g}" for values in columns.values())])
    write_text(Path(path), text.getvalue())
