"""Linear models whose one setting, the penalty, is chosen by inner folds; outer folds and what they predict.

n rows, F features, K classes (1 for a number), R runs: repeats, of several networks one after the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov2.errors import BadInput

PENALTIES = tuple(10.0**power for power in range(-1, 6))  # of the squared weights of standardised features
INNER_FOLDS = 3
MOST_BINS = 10  # of a number, by which folds are made alike
Splits = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Target:
    """What is asked of the features.

    Attributes:
        name: Its column.
        values: [n] class numbers (int), or values (float).
        classes: Their names; empty for a number.
        groups: [n] numbers of people: what folds and bootstrap draws keep together.
    """

    name: str
    values: np.ndarray
    classes: list[str]
    groups: np.ndarray

    @property
    def strata(self) -> np.ndarray:
        """By what folds are made alike: classes, or quantile bins."""
        if self.classes:
            return self.values
        num_bins = min(max(1, len(self.values) // 10), MOST_BINS)
        return np.digitize(self.values, np.unique(np.quantile(self.values, np.linspace(0, 1, num_bins + 1)[1:-1])))


@dataclass(frozen=True)
class OutOfFold:
    """What a model says of rows that it was not fitted on.

    Attributes:
        predicted: [R, n, K] probabilities, or [R, n, 1] values.
        fold: [R, n] the fold in which a row was tested.
    """

    predicted: np.ndarray
    fold: np.ndarray


def splits_of(target: Target, rows: np.ndarray, num_folds: int, seed: int) -> Splits:
    """Stratified folds of some rows that keep people together, as (fitted, tested) places in `rows`."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    strata, groups = target.strata[rows], target.groups[rows]
    has_groups = len(set(groups.tolist())) < len(groups)
    folds = (StratifiedGroupKFold if has_groups else StratifiedKFold)(num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a bin with fewer rows than folds
        return list(folds.split(rows, strata, groups))


def inner_splits(target: Target, rows: np.ndarray, seed: int) -> Splits:
    """Folds by which a penalty is chosen: those with every class on both sides.

    Raises:
        BadInput: There is none.
    """
    splits = splits_of(target, rows, INNER_FOLDS, seed)
    if target.classes:
        values = target.values[rows]
        splits = [s for s in splits if all(len(set(values[side].tolist())) == len(target.classes) for side in s)]
    if not splits:
        raise BadInput(f"{target.name}: its rarest class is in too few people to choose a penalty by: leave the class out")
    return splits


def linear_model(target: Target, inner: Splits) -> Any:
    """Logistic or ridge regression on standardised features, penalty by inner folds (log loss, mean absolute error).

    Classes weigh the same however many rows they have. The rotation changes no prediction: it makes the regression as small as
    the number of rows.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegressionCV, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rotation = PCA(svd_solver="full")
    if not target.classes:
        return make_pipeline(StandardScaler(), rotation, RidgeCV(PENALTIES, cv=inner, scoring="neg_mean_absolute_error"))
    regression = LogisticRegressionCV(
        Cs=[1 / penalty for penalty in reversed(PENALTIES)],
        l1_ratios=(0,),
        cv=inner,
        scoring=log_likelihood,
        class_weight="balanced",
        solver="newton-cholesky",
        max_iter=1000,
        use_legacy_attributes=False,
    )
    return make_pipeline(StandardScaler(), rotation, regression)


def log_likelihood(model: Any, x: np.ndarray, values: np.ndarray) -> float:
    """Mean log probability of the true classes: scikit-learn's `neg_log_loss`, whose checks take longer than a fit of 53 rows.

    Args:
        model: Fitted.
        x: [n, F].
        values: [n] of the model's classes.
    """
    probabilities = model.predict_proba(x)[np.arange(len(values)), np.searchsorted(model.classes_, values)]
    smallest = np.finfo(probabilities.dtype).eps
    return float(np.log(probabilities.clip(smallest, 1 - smallest)).mean())


def constant_model(target: Target, inner: Splits) -> Any:
    """Always the same answer: the shares of the classes, or the median."""
    from sklearn.dummy import DummyClassifier, DummyRegressor

    return DummyClassifier(strategy="prior") if target.classes else DummyRegressor(strategy="median")


def predict(model: Any, x: np.ndarray, target: Target) -> np.ndarray:
    """[rows, K] probabilities, or [rows, 1] values, by a fitted model."""
    if not target.classes:
        return model.predict(x)[:, None]
    probabilities = np.zeros((len(x), len(target.classes)))
    probabilities[:, model.classes_] = model.predict_proba(x)
    return probabilities


def cross_validate(
    make: Callable[[Target, Splits], Any],
    inputs: Sequence[np.ndarray],
    target: Target,
    folds: Sequence[Splits],
    tick: Callable[[], Any],
) -> OutOfFold:
    """Fit on all folds but one and predict that one.

    Args:
        make: `linear_model` or `constant_model`.
        inputs: Features [n, F], of several networks each.
        target: Of the rows.
        folds: Of each repeat; its number is the seed of the inner folds.
        tick: Called after each fit.
    """
    num_runs, n = len(inputs) * len(folds), len(target.values)
    predicted = np.empty((num_runs, n, max(1, len(target.classes))))
    fold = np.empty((num_runs, n), int)
    runs = [(x, repeat, splits) for x in inputs for repeat, splits in enumerate(folds)]
    for run, (x, repeat, splits) in enumerate(runs):
        for number, (fitted, tested) in enumerate(splits):
            model = make(target, inner_splits(target, fitted, repeat)).fit(x[fitted], target.values[fitted])
            predicted[run, tested], fold[run, tested] = predict(model, x[tested], target), number
            tick()
    return OutOfFold(predicted, fold)


def as_linear_map(model: Any, num_features: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight [K or 1, F] and bias of a fitted `linear_model`: logits, of two classes with one of zero, or the value."""
    rule = getattr(model, "decision_function", model.predict)
    bias = rule(np.zeros((1, num_features))).reshape(1, -1)
    weight = (rule(np.eye(num_features)).reshape(num_features, -1) - bias).T
    if hasattr(model, "decision_function") and len(weight) == 1:
        return np.concatenate([np.zeros_like(weight), weight]), np.array([0.0, bias[0, 0]])
    return weight, bias[0]
