"""Scores of classes and numbers, and intervals by patients."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, roc_auc_score

from dinov2.eval.metrics.classification import auc_per_class, calibration_error, classification_scores, regression_scores
from dinov2.eval.metrics.statistics import bootstrap_interval


def drawn(seed: int, n: int = 40, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(k), n).round(1), rng.integers(k, size=n)


def test_auc_of_many_heads_is_sklearns_with_ties() -> None:
    scores = np.stack([drawn(s)[0] for s in range(5)])
    labels = drawn(9)[1]
    wanted = [[roc_auc_score(labels == k, s[:, k]) for k in range(3)] for s in scores]
    np.testing.assert_allclose(auc_per_class(scores, labels), wanted, atol=1e-12)
    scores[2, 4, 1] = np.nan
    assert np.isnan(auc_per_class(scores, labels)).tolist() == [[False] * 3] * 2 + [[False, True, False]] + [[False] * 3] * 2
    assert np.isnan(auc_per_class(scores[0], np.zeros(40, int))).all()


def test_calibration_is_the_gap_of_confidence_and_accuracy() -> None:
    """70 % sure throughout and right in 7 of 10: calibrated; right in 4 of 10: off by 0.3."""
    probabilities = np.tile([0.7, 0.3], (10, 1))
    assert calibration_error(probabilities, np.array([0] * 7 + [1] * 3)) == pytest.approx(0, abs=1e-12)
    assert calibration_error(probabilities, np.array([0] * 4 + [1] * 6)) == pytest.approx(0.3)


@pytest.mark.parametrize("seed", range(5))
def test_f1_accuracy_and_confusion_are_sklearns(seed: int) -> None:
    probabilities, labels = drawn(seed)
    guess = probabilities.argmax(1)
    found = classification_scores(probabilities, labels, [str(i) for i in range(len(labels))])
    assert found["confusion_matrix"] == confusion_matrix(labels, guess).tolist()
    assert found["test_f1"] == pytest.approx(f1_score(labels, guess, average="macro"))
    assert found["test_balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, guess))
    assert found["test_auc"] == pytest.approx(np.mean(found["test_auc_per_class"]))


def test_numbers_are_scored_by_their_error_and_correlation() -> None:
    values = np.array([20.0, 30, 40, 50])
    found = regression_scores(values + 2, values, list("abcd"))
    assert found["test_mae"] == pytest.approx(2) and found["test_r"] == pytest.approx(1)
    assert np.isnan(regression_scores(np.full(4, 35.0), values, list("abcd"))["test_r"])


def test_intervals_cover_and_draw_whole_patients() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        x = rng.normal(size=50)
        ((low, high),) = bootstrap_interval(lambda rows, x=x: [x[rows].mean()], [str(i) for i in range(50)], draws=300)
        covered += low < 0 < high
    assert covered >= 50
    x = rng.normal(size=10).repeat(10)  # ten scans of each of ten people
    people = [str(i // 10) for i in range(100)]
    (by_person,) = bootstrap_interval(lambda rows: [x[rows].mean()], people)
    (by_scan,) = bootstrap_interval(lambda rows: [x[rows].mean()], [str(i) for i in range(100)])
    assert by_person[1] - by_person[0] > 2 * (by_scan[1] - by_scan[0])
    assert bootstrap_interval(lambda rows: [np.nan], people) == [None]
