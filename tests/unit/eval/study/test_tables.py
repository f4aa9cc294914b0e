"""The tidy tables of a study and its headline numbers, checked by hand and beside the paper's."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from dinov2.data.downstream.lists import percentage
from dinov2.data.downstream.recipes import load_recipe
from dinov2.errors import EXIT_OK, BadInput
from dinov2.eval.study import command, paper, records, runner
from dinov2.eval.study.cells import cells_of, labelled_sets
from dinov2.eval.study.compare import compare
from dinov2.eval.study.report import headlines, label_equivalence, report
from dinov2.eval.study.schema import Study, load_study
from dinov2.eval.study.table import COLUMNS, RUN_COLUMNS, collect, write_table
from tests.unit.eval.study.conftest import STANDIN, make_study


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a study that has run."""
    path = make_study(tmp_path_factory.mktemp("ran"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "POLL_S", 0.01)
        patch.setattr(command, "run_cells", partial(runner.run_cells, program=STANDIN))
        assert command.main(["run", str(path), "--jobs", "2"], lambda _: None) == EXIT_OK
    return path


@pytest.fixture
def finished(ran: Path, tmp_path: Path) -> Study:
    """A copy of what it left."""
    shutil.copytree(ran.with_name("out"), tmp_path / "out")
    return load_study(ran, [f"output_dir={tmp_path / 'out'}"])


def read(study: Study, name: str) -> list[dict[str, str]]:
    with (study.output / name).open() as file:
        return list(csv.DictReader(file))


def test_the_tables_are_tidy_whole_and_the_same_in_both_forms(finished: Study) -> None:
    items, runs = read(finished, "items.csv"), read(finished, "runs.csv")
    assert tuple(items[0]) == COLUMNS and tuple(runs[0]) == RUN_COLUMNS
    # 8 cells of 3 cases x (2 classes + mean) x 4 metrics; 4 cells of 5 cases x (2 probabilities + correct)
    assert len(items) == 8 * 3 * 3 * 4 + 4 * 5 * 3
    assert len(runs) == 8 * 3 * 4 + 4 * (2 + 4)  # AUC of two classes, and four means
    assert {(r["dataset"], r["percent"], r["n_train"]) for r in items} == {
        ("balls", "25", "2"), ("balls", "100", "8"), ("ages", "100", "6"),
    }  # fmt: skip
    assert {r["study"] for r in items} == {"small"} and {r["method"] for r in items} == {"3DINO", "Random"}
    own = [r for r in items if (r["dataset"], r["method"], r["percent"], r["seed"]) == ("balls", "3DINO", "25", "1")]
    dice = {(r["case"], r["class"]): float(r["value"]) for r in own if r["metric"] == "dice"}
    assert dice[("case10xx", "ball")] == dice[("case10xx", "mean")] == pytest.approx(0.3 + 0.3 + 0.05 + 0.01 + 0.008)
    correct = {r["class"] for r in items if r["metric"] == "correct"}
    assert correct == {"low", "high"}
    for name in ("items", "runs"):
        table = pq.read_table(finished.output / f"{name}.parquet").to_pylist()
        as_text = [
            {k: "" if v is None else str(percentage(v) if k == "percent" else v) for k, v in row.items()} for row in table
        ]
        assert as_text == read(finished, f"{name}.csv")


def test_a_share_may_be_no_whole_percentage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One case of eight: 12.5 %; and 100.0 is 100."""
    path = make_study(tmp_path)
    monkeypatch.setattr(command, "run_cells", partial(runner.run_cells, program=STANDIN))
    words = [str(path), "datasets.balls.percents=[12.5,100.0]", "methods={3DINO: {weights: random}, Random: }", "seeds=[0]"]
    for step in ("run", "report"):
        assert command.main([step, *words], lambda _: None) == EXIT_OK
    cells = sorted(str(p.parent.relative_to(tmp_path / "out/cells")) for p in tmp_path.glob("out/cells/balls/Random/*/0/begun"))
    assert cells == ["balls/Random/100/0", "balls/Random/12.5/0"]
    study = load_study(path, words[1:])
    runs = [r for r in read(study, "runs.csv") if r["dataset"] == "balls"]
    assert {(r["percent"], r["n_train"]) for r in runs} == {("12.5", "1"), ("100", "8")}
    assert {r["percent"] for r in read(study, "comparison.csv") if r["dataset"] == "balls"} == {"12.5", "100"}


def test_what_is_not_counted_is_empty_and_no_part_of_a_mean(finished: Study) -> None:
    cell = cells_of(finished, labelled_sets(finished))[0]
    path = cell.folder / "per_case.csv"
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if ",ball," in line)
    case = lines[first].split(",")[0]
    lines[first] = f"{case},ball,,,,1,"
    path.write_text("\n".join(lines) + "\n")
    collect(finished, lambda _: None)
    own = {"method": cell.method, "dataset": cell.dataset, "percent": "25", "seed": "0", "case": case}
    rows = [r for r in read(finished, "items.csv") if own.items() <= r.items()]
    value = {(r["class"], r["metric"]): r["value"] for r in rows}
    assert value[("ball", "dice")] == value[("mean", "dice")] == ""
    assert value[("background", "dice")] != ""


def test_methods_that_saw_other_cases_are_refused_by_name(finished: Study) -> None:
    """The lists are on another machine, so that only what was recorded can be compared."""
    elsewhere = dataclasses.replace(finished, base_data_dir="nowhere")
    cell = next(c for c in cells_of(finished, labelled_sets(finished)) if c.name == "balls/Random/25/1")
    path, before = cell.folder / records.IDENTITY, (cell.folder / records.IDENTITY).read_text()
    for part in ("test", "validation", "training"):
        content = json.loads(before)
        content["parts"][part]["sha"] = "another"
        path.write_text(json.dumps(content))
        other = "balls/3DINO/25/1" if part == "training" else "balls/3DINO/25/0"
        with pytest.raises(BadInput, match=f"balls/Random/25/1: has other {part} cases than {other}"):
            collect(elsewhere, lambda _: None)
    path.write_text(before)
    assert collect(elsewhere, lambda _: None) == EXIT_OK


def test_a_table_of_other_test_cases_is_refused_by_their_names(finished: Study) -> None:
    cell = next(c for c in cells_of(finished, labelled_sets(finished)) if c.name == "ages/Random/100/0")
    path = cell.folder / "predictions.csv"
    path.write_text(path.read_text().replace("case12", "stranger"))
    with pytest.raises(BadInput, match=r"ages/Random/100/0: has other tested cases than ages/3DINO/100/0 \(case12, stranger\)"):
        collect(finished, lambda _: None)


def test_a_report_says_gains_and_label_equivalence(finished: Study) -> None:
    said: list[str] = []
    assert report(finished, said.append) == EXIT_OK
    rows = [r for r in read(finished, "headline.csv") if r["dataset"] == "balls"]
    values = {(r["percent"], r["method"]): float(r["value"]) for r in rows if r["kind"] == "value"}
    lengths = (len("case10xx") + len("case11xxx") + len("case12")) / 3000
    assert values[("25", "3DINO")] == pytest.approx(0.6 + 0.05 + 0.005 + lengths)  # the mean of two seeds
    gains = {(r["kind"], r["percent"]): float(r["gain_percent"]) for r in rows if r["gain_percent"]}
    for percent in ("25", "100"):
        expected = 100 * (values[(percent, "3DINO")] / values[(percent, "Random")] - 1)
        assert gains[(paper.NEXT_BEST, percent)] == gains[(paper.BASELINE, percent)] == pytest.approx(expected)
    assert gains[(paper.MOST_BASELINE, "")] == max(gains[(paper.BASELINE, p)] for p in ("25", "100"))
    share = next(r for r in rows if r["kind"] == paper.EQUIVALENCE)
    assert (share["value"], share["against"]) == ("25.0", "Random")
    assert "balls: 3DINO is as good as Random with 100 % at the smallest share that was run, 25 % of the labels" in said
    assert any(line.startswith("ages ") and "+" in line for line in said)


def test_a_reports_tests_are_those_of_compare(finished: Study, ran: Path, tmp_path: Path) -> None:
    """Of one seed the two read the same numbers; of several a case's is their mean, and a probe's are the seeds' own."""
    one_seed = load_study(ran, [f"output_dir={finished.output}", "seeds=[0]"])
    collect(one_seed, lambda _: None)
    said: list[str] = []
    report(one_seed, said.append)
    cells = finished.cells / "balls"
    compare([cells / method / "25" / "0" for method in ("3DINO", "Random")], tmp_path / "by_hand", lambda _: None)
    with (tmp_path / "by_hand" / "comparison.csv").open() as file:
        rows = [{k: v.removesuffix("_25_0") for k, v in row.items()} for row in csv.DictReader(file)]
    expected = [{**row, "dataset": "balls", "percent": "25"} for row in rows]
    found = [r for r in read(one_seed, "comparison.csv") if (r["dataset"], r["percent"]) == ("balls", "25")]
    for metric in ("dice", "hd95_mm"):
        assert [r for r in found if r["metric"] == metric] == [r for r in expected if r["metric"] == metric] != []
    assert any("Wilcoxon" in line for line in said) and any("3DINO - Random" in line for line in said)

    collect(finished, lambda _: None)
    report(finished, lambda _: None)
    both = {(r["dataset"], r["percent"], r["metric"], r["run"], r["minus"]): r for r in read(finished, "comparison.csv")}
    items = [r for r in read(finished, "items.csv") if r["metric"] == "dice" and r["class"] == "ball" and r["percent"] == "25"]
    by_case: dict[str, list[float]] = {}
    for row in items:
        if row["method"] == "3DINO":
            by_case.setdefault(row["case"], []).append(float(row["value"]))
    means = [sum(values) / 2 for values in by_case.values()]
    row = both["balls", "25", "dice", "3DINO", ""]
    assert float(row["mean"]) == pytest.approx(sum(means) / 3, rel=1e-5) and row["n"] == "3"
    seeds = [r for r in read(finished, "runs.csv") if r["metric"] == "auc" and r["class"] == "mean"]
    ours, theirs = ([float(r["value"]) for r in seeds if r["method"] == m] for m in ("3DINO", "Random"))
    test = both["ages", "100", "auc", "3DINO", "Random"]
    welch = stats.ttest_ind(ours, theirs, equal_var=False)
    assert test["test"] == "Welch" and float(test["mean"]) == pytest.approx(np.mean(ours) - np.mean(theirs), rel=1e-4)
    if np.isfinite(welch.pvalue):
        assert float(test["p"]) == pytest.approx(welch.pvalue, rel=1e-4)


def test_what_pretraining_gains_the_swin_transformer_stands_beside_the_papers(tmp_path: Path) -> None:
    study = load_study("paper_segmentation", [f"output_dir={tmp_path}"])
    scores = {"SwinTransfer": {25: 0.66, 100: 0.8}, "SwinRandom": {25: 0.6, 100: 0.8}}
    rows = [
        {"method": m, "dataset": "BTCV", "percent": p, "seed": 0, "class": "mean", "metric": "dice", "value": v}
        for m, of in scores.items()
        for p, v in of.items()
    ]
    [line] = [h for h in headlines(study, "BTCV", rows) if h.kind == paper.MOST_BASELINE and h.method == "SwinTransfer"]
    assert line.gain_percent == pytest.approx(10.0) and line.against == "SwinRandom"
    assert paper.said("segmentation", "BTCV", None, paper.MOST_BASELINE, "SwinTransfer").text == "1.8"


def test_label_equivalence_is_interpolated_between_the_shares_that_were_run() -> None:
    curve = {10: 0.5, 25: 0.6, 100: 0.9}
    assert label_equivalence(curve, 0.7) == (pytest.approx(50.0), "(by linear interpolation)")
    assert label_equivalence(curve, 0.6) == (pytest.approx(25.0), "(by linear interpolation)")
    assert label_equivalence(curve, 0.4)[0] == 10.0
    assert label_equivalence(curve, 0.95) == (None, "at no share that was run")
    assert label_equivalence({25: 0.8, 50: 0.7, 100: 0.9}, 0.8)[0] == 25.0  # the smallest, where a curve is not monotone


def test_the_papers_numbers_stand_beside_ours(tmp_path: Path) -> None:
    study = load_study("paper_segmentation", [f"output_dir={tmp_path}"])
    scores = {"3DINO": (0.88, 0.9), "Random": (0.8, 0.85), "SwinRandom": (0.82, 0.86)}
    rows = [
        {
            "study": study.name, "method": m, "dataset": "BTCV", "percent": p, "n_train": 5, "seed": 0, "class": "mean",
            "metric": "dice", "value": v,
        }
        for m, pair in scores.items() for p, v in zip((25, 100), pair, strict=True)
    ]  # fmt: skip
    write_table(tmp_path / "runs", RUN_COLUMNS, rows)
    write_table(tmp_path / "items", COLUMNS, [])
    assert report(study, lambda _: None) == EXIT_OK
    found = {(r["kind"], r["percent"], r["method"]): r for r in read(study, "headline.csv")}
    assert found[("value", "25", "3DINO")]["paper"] == "0.77 (0.72 to 0.81)"
    assert found[("value", "25", "Random")]["paper"] == "0.59 (0.53 to 0.65)"
    next_best = found[(paper.NEXT_BEST, "100", "3DINO")]
    assert next_best["paper"] == "0.9" and next_best["against"] == "SwinRandom" and "Results" in next_best["place"]
    assert float(next_best["gain_percent"]) == pytest.approx(100 * (0.9 / 0.86 - 1))
    assert found[(paper.MOST_BASELINE, "", "3DINO")]["paper"] == "55.1"
    assert found[(paper.EQUIVALENCE, "", "3DINO")]["paper"] == "below 50"
    assert not list(headlines(study, "BraTS", rows))


def test_a_class_has_its_gain_beside_the_papers(tmp_path: Path) -> None:
    study = load_study("paper_classification", [f"output_dir={tmp_path}", "seeds=[0]"])
    scores = {"3DINO": (0.9, 0.6), "MONAI-ViT": (0.6, 0.5), "SwinTransfer": (0.5, 0.8)}
    rows = [
        {
            "study": study.name, "method": m, "dataset": "COVID-CT-MD", "percent": 25, "n_train": 5, "seed": 0, "class": name,
            "metric": "auc", "value": v,
        }
        for m, pair in scores.items() for name, v in zip(("COVID-19", "Normal", "mean"), (*pair, sum(pair) / 2), strict=True)
    ]  # fmt: skip
    write_table(tmp_path / "runs", RUN_COLUMNS, rows)
    write_table(tmp_path / "items", COLUMNS, [])
    said: list[str] = []
    assert report(study, said.append) == EXIT_OK
    found = {r["label"]: r for r in read(study, "headline.csv") if r["kind"] == paper.MEAN_NEXT_BEST}
    gains = {label: float(r["gain_percent"]) for label, r in found.items()}
    assert gains == pytest.approx({"": 100 * (0.75 / 0.65 - 1), "COVID-19": 50.0, "Normal": -25.0})
    assert {label: r["paper"] for label, r in found.items()} == {"": "18.9", "COVID-19": "23", "Normal": ""}
    assert any(f"{paper.MEAN_NEXT_BEST}: COVID-19" in line and line.endswith("+50.0     23") for line in said)


def test_a_number_of_the_paper_is_of_a_study_that_runs_it() -> None:
    for name, numbers in paper.PAPER.items():
        study = load_study(f"paper_{name}")
        assert {one.label for one in numbers} <= {"", *(n for d in study.datasets for n in load_recipe(d).output_names)}
        assert study.paper == name
        for one in numbers:
            assert one.dataset in study.datasets and one.method in study.methods and one.place
            assert one.percent is None or one.percent in study.dataset(one.dataset).percents


def test_a_report_without_tables_says_what_to_do(study: Study) -> None:
    with pytest.raises(BadInput, match="runs.csv.*dinov2 study collect"):
        report(study, lambda _: None)
    study.output.mkdir()
    (study.output / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="no table of runs"):
        report(study, lambda _: None)
