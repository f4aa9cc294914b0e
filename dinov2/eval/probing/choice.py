"""What kNN, logistic and ridge regression share: features of all parts, the choice of a setting, the files of a result.

Settings are chosen by the validation part; the test part is looked at once, with the chosen one.

n cases, F features.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov2.data.downstream.lists import SPLITS, Item
from dinov2.distributed import is_main_process
from dinov2.eval.metrics.classification import auc_per_class, classification_scores, write_predictions
from dinov2.eval.probing.linear_heads import LAYER_CHOICES, Head
from dinov2.eval.probing.parts import groups_of, labels_of, part_features, require_every_class, training_items
from dinov2.eval.run import Setting
from dinov2.files import write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Features and labels of a part.

    Attributes:
        x: [n, F] float64, all layers' (a head takes its columns).
        y: [n], class numbers or values.
        items: The cases.
    """

    x: np.ndarray
    y: np.ndarray
    items: Sequence[Item]


def feature_choices(embed_dim: int, num_features: int) -> dict[str, slice]:
    """Parts of the features by name: class tokens of the last {1, 4} layers, with and without pooled patches."""
    layers = num_features // embed_dim - 1
    counts = sorted({min(n, layers) for n in LAYER_CHOICES})
    heads = [Head(n, pooled, 0.0) for n in counts for pooled in (False, True)]
    return {f"last {h.layers}{' and pooled patches' if h.pooled else ''}": h.columns(layers, embed_dim) for h in heads}


def all_features(setting: Setting) -> tuple[dict[str, Part], dict[str, slice]]:
    """Every part's features by the frozen backbone, of the training part its share, and the choices of them; the run begins.

    Raises:
        BadInput: A class is absent from a part, or a case cannot be used.
    """
    request = setting.request
    training = training_items(setting.cases["training"], request.dataset_percent, request.dataset_seed)
    cases = {**setting.cases, "training": training}
    if setting.recipe.task == "classification":
        for part in SPLITS:
            require_every_class(cases[part].items, setting.recipe, part)
    parts = {}
    for part in SPLITS:
        features = part_features(setting, setting.backbone, cases[part], part)
        parts[part] = Part(features.double().numpy(), labels_of(cases[part].items).numpy(), cases[part].items)
    setting.begin()  # every case could be used
    return parts, feature_choices(setting.backbone.embed_dim, features.shape[1])


def choose(scores: dict[Any, float]) -> Any:
    """The setting with the highest validation score, the first of equals; one whose score is not finite only if all are."""
    return max(scores, key=lambda setting: scores[setting] if np.isfinite(scores[setting]) else -np.inf)


def mean_auc(probabilities: np.ndarray, part: Part) -> float:
    return float(auc_per_class(probabilities, part.y).mean())


def write_classification(
    setting: Setting, parts: dict[str, Part], probabilities: np.ndarray, chosen: dict[str, Any], scores: dict[Any, float]
) -> None:
    """`predictions.csv`, then `results.json`.

    Args:
        probabilities: [n, K] of the test part.
        chosen: What the validation part chose.
        scores: Validation AUC of every setting.
    """
    if not is_main_process():
        return
    names, test = setting.recipe.output_names, parts["test"]
    columns = {f"p_{name}": probabilities[:, k] for k, name in enumerate(names)}
    labels = [names[k] for k in test.y]
    write_predictions(setting.output_dir / "predictions.csv", [i.case for i in test.items], labels, columns)
    results = classification_scores(probabilities, test.y, groups_of(test.items))
    write_results(setting, {**results, "classes": names}, parts, chosen, scores)
    logger.info("test AUC %.4f with %s", results["test_auc"], chosen)


def write_results(
    setting: Setting, results: dict[str, Any], parts: dict[str, Part], chosen: dict[str, Any], scores: dict[Any, float]
) -> None:
    counts = {"n_train": len(parts["training"].y), "n_validation": len(parts["validation"].y), "n_test": len(parts["test"].y)}
    validation = [{"setting": str(k), "score": v} for k, v in scores.items()]
    write_json(setting.output_dir / "results.json", {**results, "chosen": chosen, "validation": validation, **counts})
