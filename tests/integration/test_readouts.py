"""kNN, logistic and ridge regression of frozen features: chosen on validation, scored on test; the launchers."""

from __future__ import annotations

import ast
import csv
import importlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK
from dinov2.eval.knn import TEMPERATURE, knn_probabilities
from tests.conftest import SMALL

NETWORK = [w for w in SMALL if w.startswith(("student.", "crops.", "train.num_threads"))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Balls whose grain grows with a number, the label; in thirds it is a class."""
    folder = tmp_path_factory.mktemp("grain")
    rows = []
    for i in range(36):
        rng, age = np.random.default_rng(i), 20 + 2 * (7 * i % 36)
        axes = np.stack(np.meshgrid(*[np.linspace(-1, 1, 18)] * 3, indexing="ij"), -1)
        image = (np.linalg.norm(axes, axis=-1) < 0.9) * (100 + rng.normal(0, age - 15, axes.shape[:3]))
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), folder / f"scan{i}.nii.gz")
        rows.append({"image": f"scan{i}.nii.gz", "label": age, "patient": f"p{i}"})
    parts = {"shuffle_seed": 0, "training": rows[:18], "validation": rows[18:26], "test": rows[26:]}
    for name in ("thirds", "age"):
        (folder / f"{name}_cls_datalist.json").write_text(json.dumps(parts))
    (folder / "thirds.yaml").write_text("task: classification\nbins: tertiles\n")
    (folder / "age.yaml").write_text("task: regression\n")
    return folder


def run(program: str, recipe: str, data: Path, out: Path, *extra: str) -> int:
    flags = {
        "pretrained-weights": "random", "output-dir": out, "dataset-name": data / f"{recipe}.yaml", "base-data-dir": data,
        "image-size": 16, "batch-size": 8, "num-workers": 0, "cache-dir": data / f"cache_{recipe}",
    }  # fmt: skip
    words = [*(w for k, v in flags.items() for w in (f"--{k}", str(v))), *extra, "--opts", *NETWORK]
    return importlib.import_module(f"dinov2.eval.{program}").main(words)


def test_votes_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    train, labels, queries, k = rng.normal(size=(9, 4)), rng.integers(3, size=9), rng.normal(size=(5, 4)), 4
    found = knn_probabilities(train, labels, queries, k, 3)
    for query, row in zip(queries, found, strict=True):
        cosine = [float(query @ t / np.linalg.norm(query) / np.linalg.norm(t)) for t in train]
        votes = np.zeros(3)
        for i in sorted(range(9), key=lambda i: -cosine[i])[:k]:
            votes[labels[i]] += np.exp(cosine[i] / TEMPERATURE)
        np.testing.assert_allclose(row, votes / votes.sum(), rtol=1e-9)


@pytest.mark.parametrize("program", ["knn", "log_regression"])
def test_classes_by_thirds_are_read_from_features(data: Path, tmp_path: Path, program: str) -> None:
    assert run(program, "thirds", data, tmp_path) == EXIT_OK
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["test_auc"] > 0.75, found["test_auc"]
    ages = sorted(20 + 2 * (7 * i % 36) for i in range(18))
    assert found["classes"] == [f"below {ages[6]}", f"{ages[6]} to {ages[12]}", f"from {ages[12]}"]
    best = max(v["score"] for v in found["validation"])
    assert next(v["score"] for v in found["validation"] if v["setting"] == str(tuple(found["chosen"].values()))) == best
    if program == "log_regression":  # DINOv2's values
        tried = {ast.literal_eval(v["setting"])[1] for v in found["validation"]}
        assert sorted(tried) == pytest.approx(10.0 ** np.linspace(-6, 5, 45))
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert len(rows) == found["n_test"] == 10


def test_a_number_is_read_from_features_better_than_by_the_median(data: Path, tmp_path: Path) -> None:
    assert run("regression", "age", data, tmp_path) == EXIT_OK
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["test_mae"] < 0.7 * found["median_mae"] and found["test_r"] > 0.7, found
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    mae = np.mean([abs(float(r["label"]) - float(r["predicted"])) for r in rows])
    assert mae == pytest.approx(found["test_mae"], rel=1e-4)


def test_the_test_part_decides_nothing_but_its_own_score(data: Path, tmp_path: Path) -> None:
    """Other labels of the test part leave choice and predictions as they are."""
    for scan in data.glob("scan*.nii.gz"):
        (tmp_path / scan.name).symlink_to(scan)
    parts = json.loads((data / "age_cls_datalist.json").read_text())
    for row in parts["test"]:
        row["label"] = 120 - row["label"]
    (tmp_path / "age_cls_datalist.json").write_text(json.dumps(parts))
    (tmp_path / "age.yaml").write_text((data / "age.yaml").read_text())
    assert (
        run("regression", "age", data, tmp_path / "true") == run("regression", "age", tmp_path, tmp_path / "other") == EXIT_OK
    )
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("true", "other"))
    assert one["chosen"] == other["chosen"] and one["validation"] == other["validation"]
    assert one["test_mae"] != other["test_mae"]
    tables = [csv.DictReader((tmp_path / name / "predictions.csv").open()) for name in ("true", "other")]
    assert [row["predicted"] for row in tables[0]] == [row["predicted"] for row in tables[1]]


@pytest.mark.parametrize(
    "program, recipe, label, expected",
    [
        ("regression", "age", "old", 'label "old" is not a number'),
        ("knn", "thirds", "old", 'label "old" is not a number, bins are tertiles'),
        ("knn", "age", 30, "a recipe for regression, not classification: use dinov2/eval/regression.py"),
    ],
)
def test_labels_that_are_no_numbers_and_other_tasks_are_one_line(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], program: str, recipe: str, label: object, expected: str
) -> None:
    parts = json.loads((data / f"{recipe}_cls_datalist.json").read_text())
    parts["training"][0]["label"] = label
    (tmp_path / f"{recipe}_cls_datalist.json").write_text(json.dumps(parts))
    (tmp_path / f"{recipe}.yaml").write_text((data / f"{recipe}.yaml").read_text())
    assert run(program, recipe, tmp_path, tmp_path / "out") == EXIT_BAD_INPUT
    text = capfd.readouterr().err
    assert expected in text and "Traceback" not in text


@pytest.mark.parametrize("launcher", ["linear", "knn", "log_regression", "regression"])
def test_launchers_check_the_programs_words_and_need_slurm(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    main = importlib.import_module(f"dinov2.run.eval.{launcher}").main
    words = ["--pretrained-weights", "w", "--output-dir", str(tmp_path), "--dataset-name", "d", "--base-data-dir", "b"]
    assert main(["--ngpus", "1", *words]) == EXIT_BAD_INPUT
    assert "sbatch was not found" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--image-sise", "96"])
