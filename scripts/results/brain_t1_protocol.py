"""What a split into 31, 11 and 11 people and a resized input did to the sex of 53 brains: the numbers of docs/results.md.

    python scripts/results/brain_t1_protocol.py FEATURES.parquet RESIZED.parquet DATA_FOLDER

Two tables of `dinov2 embed` of the same scans, whole and resized to a cube, as `scripts/results/brain_t1_probe.sh` makes them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from dinov2.data.downstream.lists import SPLITS
from dinov2.data.downstream.split import read_parts
from dinov2.eval.crossval.command import PART_CHOICES, ProbeRequest, open_question
from dinov2.eval.crossval.models import OutOfFold, Target, cross_validate, linear_model, splits_of
from dinov2.eval.crossval.scores import summarise
from dinov2.eval.crossval.tables import read_embeddings
from dinov2.eval.metrics.classification import auc_per_class

PENALTIES = (0.1, 1.0, 10.0, 1e2, 1e3, 1e4)
FIXED = ("cls+pooled", 1e2)  # a setting that nothing chose
RANDOM_SPLITS, RANDOM_TESTS, REPEATS = 100, 2000, 3
EARLIER = 0.31  # the AUC of the one split that was reported before


def auc(scores: np.ndarray, values: np.ndarray) -> float:
    return float(auc_per_class(np.stack([-scores, scores], -1), values)[1])


def random_parts(values: np.ndarray, sizes: list[tuple[int, int]], rng: np.random.Generator) -> list[np.ndarray]:
    """Parts of so many people of each of two classes."""
    classes = [rng.permutation(np.flatnonzero(values == k)) for k in (0, 1)]
    cuts = [np.split(rows, np.cumsum([size[k] for size in sizes])[:-1]) for k, rows in enumerate(classes)]
    return [np.concatenate(parts) for parts in zip(*cuts, strict=True)]


def one_split(inputs: dict[str, np.ndarray], values: np.ndarray, parts: list[np.ndarray]) -> tuple[float, float, float]:
    """Validation and test AUC of the setting that validation chooses, and the test AUC of the fixed one."""
    training, validation, test = parts
    found = {}
    for name, features in inputs.items():
        x = StandardScaler().fit(features[training]).transform(features)
        for penalty in PENALTIES:
            model = LogisticRegression(C=1 / penalty, class_weight="balanced", solver="newton-cholesky")
            logits = model.fit(x[training], values[training]).decision_function(x)
            found[name, penalty] = auc(logits[validation], values[validation]), auc(logits[test], values[test])
    return *max(found.values(), key=lambda pair: pair[0]), found[FIXED][1]


def range_of(values: np.ndarray) -> str:
    low, high = np.percentile(values, [2.5, 97.5])
    return f"{values.mean():.2f} ({low:.2f} to {high:.2f}; {EARLIER} or less in {100 * (values <= EARLIER).mean():.0f} %)"


def cross_validated(inputs: dict[str, dict[str, np.ndarray]], target: Target) -> dict[str, OutOfFold]:
    folds = [splits_of(target, np.arange(len(target.values)), 5, repeat) for repeat in range(REPEATS)]
    return {name: cross_validate(linear_model, [x[FIXED[0]]], target, folds, lambda: None) for name, x in inputs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("features", "resized", "data_folder"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    table = args.data_folder / "brain_t1" / "participants.csv"
    question = open_question(ProbeRequest(args.features, table, "sex", Path("unused")), print)
    target, rows, whole = question.target, question.rows, question.embeddings
    resized = read_embeddings(args.resized)
    assert resized.ids == whole.ids, "tables of the same list"
    views = {"whole image": whole, "resized": resized}
    inputs = {name: {parts: table.columns(parts)[rows] for parts in PART_CHOICES} for name, table in views.items()}
    listed = read_parts(args.data_folder / "splits.json", "brain_t1")
    names = [Path(whole.scans[i]).name for i in rows]
    split = [np.flatnonzero([name in listed[part] for name in names]) for part in SPLITS]
    sizes = [(int((target.values[part] == 0).sum()), int((target.values[part] == 1).sum())) for part in split]
    found = cross_validated(inputs, target)
    summary = summarise(found, "whole image", target)
    print("cross-validated:", {name: one["auc"] for name, one in summary["scores"].items()})
    print("whole image - resized:", summary["differences"]["resized"]["auc"])
    for name, x in inputs.items():
        scores = found[name].predicted[..., 1].mean(0)
        rng = np.random.default_rng(0)
        tests = [random_parts(target.values, sizes, rng)[2] for _ in range(RANDOM_TESTS)]
        print(f"{name}, 11 random people out of fold: {range_of(np.array([auc(scores[t], target.values[t]) for t in tests]))}")
        print(f"{name}, the split's 11 people out of fold: {auc(scores[split[2]], target.values[split[2]]):.2f}")
        print(f"{name}, the split: validation, test, test of {FIXED}: {one_split(x, target.values, split)}")
        splits = [random_parts(target.values, sizes, np.random.default_rng(seed)) for seed in range(RANDOM_SPLITS)]
        table_of = np.array([one_split(x, target.values, parts) for parts in splits])  # [splits, 3]
        print(f"{name}, {RANDOM_SPLITS} random splits: validation of the chosen {range_of(table_of[:, 0])}")
        print(
            f"{name}, its test {range_of(table_of[:, 1])}; correlation {np.corrcoef(table_of[:, 0], table_of[:, 1])[0, 1]:.2f}"
        )
        print(f"{name}, test of the fixed setting {range_of(table_of[:, 2])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
