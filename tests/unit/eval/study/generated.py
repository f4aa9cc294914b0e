"""Tables of a study that nobody ran: drawn numbers in the form that `dinov2 study collect` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dinov2.eval.study.schema import Study, load_study
from dinov2.eval.study.table import COLUMNS, MEAN, RUN_COLUMNS, write_table


def make_tables(
    folder: Path,
    methods: Mapping[str, Any],
    segmented: Mapping[str, tuple[Sequence[str], Mapping[int, int]]],
    classified: Mapping[str, tuple[Sequence[str], Mapping[int, int]]],
    seeds: Sequence[int] = (0, 1),
    cases: int = 4,
    absent: Sequence[str] = (),
    **keys: Any,
) -> Study:
    """A study and its tables below a folder.

    Args:
        methods: As in a study's file; the first is the best, and so on.
        segmented: Classes (without the background), and labelled cases by percent, of each segmentation.
        classified: The same of each classification.
        absent: Classes that no test case has.
        keys: Of the study's file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    datasets: dict[str, Any] = {}
    rng = np.random.default_rng(1)
    items: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for name, (classes, counts) in {**segmented, **classified}.items():
        is_segmentation = name in segmented
        names = ["background", *classes] if is_segmentation else list(classes)
        recipe = {"task": "segmentation" if is_segmentation else "classification", "classes": dict(enumerate(names))}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        datasets[name] = {"recipe": str(folder / f"{name}.yaml"), "percents": list(counts)}
        hard = rng.normal(0, 0.03, cases)
        for percent, count in counts.items():
            for seed in seeds:
                for place, method in enumerate(methods):
                    common = {
                        "study": "s",
                        "method": method,
                        "dataset": name,
                        "percent": percent,
                        "n_train": count,
                        "seed": seed,
                    }
                    level = 0.93 - 0.3 * (1 + 0.55 * place) / (count**0.45 + 0.6) - 0.006 * place
                    of_task = _segmentation if is_segmentation else _classification
                    for row in of_task(rng, classes, level, hard, absent):
                        (items if "case" in row else runs).append({**common, **row})
    write_table(folder / "out" / "items", COLUMNS, items)
    write_table(folder / "out" / "runs", RUN_COLUMNS, runs)
    content = {"output_dir": str(folder / "out"), "datasets": datasets, "methods": dict(methods), "seeds": list(seeds), **keys}
    (folder / "generated.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_study(folder / "generated.yaml")


def _segmentation(
    rng: np.random.Generator, classes: Sequence[str], level: float, hard: np.ndarray, absent: Sequence[str]
) -> Any:
    of_class: dict[str, list[float]] = {}
    for i, difficulty in enumerate(hard):
        dice = {
            name: None if name in absent else float(np.clip(level + difficulty - 0.04 * k + rng.normal(0, 0.02), 0.02, 0.99))
            for k, name in enumerate(classes)
        }
        known = [v for v in dice.values() if v is not None]
        for name, value in (*dice.items(), (MEAN, float(np.mean(known)) if known else None)):
            distance = None if value is None else (1 - value) * 40 + 1
            for metric, number in (("dice", value), ("hd95_mm", distance), ("nsd", value), ("volume_error_ml", distance)):
                yield {"case": f"case{i}", "class": name, "metric": metric, "value": number}
            if value is not None:
                of_class.setdefault(name, []).append(value)
    for name in (*classes, MEAN):
        mean = float(np.mean(of_class[name])) if name in of_class else None
        yield from ({"class": name, "metric": m, "value": mean} for m in ("dice", "nsd"))


def _classification(
    rng: np.random.Generator, classes: Sequence[str], level: float, hard: np.ndarray, absent: Sequence[str]
) -> Any:
    present = [name for name in classes if name not in absent]
    for i, difficulty in enumerate(hard):
        truth = present[i % len(present)]
        logits = rng.normal(0, 1, len(classes))
        logits[classes.index(truth)] += 6 * (level + 2 * difficulty - 0.45)
        chances = np.exp(logits) / np.exp(logits).sum()
        guess = classes[int(chances.argmax())]
        for name, chance in zip(classes, chances, strict=True):
            yield {"case": f"case{i}", "class": name, "metric": "probability", "value": float(chance)}
        yield {"case": f"case{i}", "class": truth, "metric": "correct", "value": float(guess == truth)}
    for k, name in enumerate(classes):
        value = None if name in absent else float(np.clip(level - 0.03 * k + rng.normal(0, 0.02), 0, 1))
        yield {"class": name, "metric": "auc", "value": value}
    for metric, drop in (("auc", 0.0), ("f1", 0.08), ("balanced_accuracy", 0.1), ("calibration_error", 0.8)):
        yield {"class": MEAN, "metric": metric, "value": float(np.clip(level - drop + rng.normal(0, 0.015), 0, 1))}
