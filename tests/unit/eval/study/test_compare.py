"""`dinov2 compare` on runs of ours and of other software: what is printed and written, and what is refused by name."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from dinov2.cli import main
from dinov2.eval.metrics.classification import write_predictions
from dinov2.eval.metrics.segmentation import Score, write_per_case_csv
from dinov2.eval.metrics.statistics import bootstrap_interval
from dinov2.eval.study.compare import MEAN, compare_results, require_comparable
from dinov2.eval.study.results import ALL, read_results, read_runs
from dinov2.eval.study.statistics import welch, wilcoxon
from dinov2.files import write_json

CASES = [f"hippocampus_{i:03d}" for i in range(12)]
CLASSES = ("anterior", "posterior")
Dice = dict[str, np.ndarray]  # of each class [cases]


def dice_of(seed: int, cases: Sequence[str] = CASES) -> Dice:
    """Of a run whose cases are as hard as those of another."""
    hard = np.random.default_rng(0).uniform(0.6, 0.9, (2, len(cases)))
    found = np.round(hard + np.random.default_rng(seed).normal(0, 0.03, hard.shape), 4)
    return dict(zip(CLASSES, found, strict=True))


def segmentation(folder: Path, dice: Mapping[str, np.ndarray], cases: Sequence[str] = CASES, tolerance: float = 1.0) -> Path:
    """A folder as `dinov2 segment` leaves it, with a background."""
    folder.mkdir(parents=True)
    scores = []
    for i, case in enumerate(cases):
        scores.append(Score(case, "background", 0.99, 1, 1, tolerance, 0, True, True))
        for name, values in dice.items():
            there = not math.isnan(values[i])
            scores.append(Score(case, name, values[i], 3 - values[i] if there else math.nan, 0.5, tolerance, 0.1, there, there))
    write_per_case_csv(folder / "per_case.csv", scores)
    write_json(folder / "results.json", {"test": {"mean": {}, "mean_with_background": {}}})
    return folder


def probe(folder: Path, auc: Sequence[float], labels: str = "mfmf") -> Path:
    """A folder as `dinov2 linear` leaves it, with as many seeds."""
    seeds = list(range(len(auc)))
    table = {f"test_{score}": list(auc) for score in ("auc", "f1", "balanced_accuracy", "calibration_error")}
    for seed in seeds:
        of_seed = folder / f"seed_{seed}" if len(seeds) > 1 else folder
        of_seed.mkdir(parents=True)
        write_predictions(of_seed / "predictions.csv", list("abcd"), list(labels), {"p_f": np.zeros(4), "p_m": np.ones(4)})
    means = {name: float(np.mean(values)) for name, values in table.items()}
    several = {"by_seed": table, "seeds": seeds} if len(seeds) > 1 else {"seed": 0}
    write_json(folder / "results.json", {**means, **several, "classes": ["f", "m"]})
    return folder


def nnunet(folder: Path, dice: Mapping[str, np.ndarray], names: Mapping[str, Any] | None) -> Path:
    """`summary.json` where nnU-Net's validation of a fold leaves it, `dataset.json` where its training does."""
    validation = folder / "fold_0" / "validation"
    validation.mkdir(parents=True)
    keys = dict(zip(dice, ("1", "2"), strict=True))
    per_case = []
    for i, case in enumerate(CASES):
        metrics = {keys[c]: {"Dice": v[i], "IoU": v[i] / (2 - v[i]), "TP": 10, "n_ref": 20} for c, v in dice.items()}
        files = {"prediction_file": f"/there/validation/{case}.nii.gz", "reference_file": f"/there/gt/{case}.nii.gz"}
        per_case.append({"metrics": metrics, **files})
    text = json.dumps({"foreground_mean": {}, "mean": {}, "metric_per_case": per_case})  # bare NaN and all, as nnU-Net writes
    (validation / "summary.json").write_text(text)
    if names is not None:
        (folder / "dataset.json").write_text(
            json.dumps({"channel_names": {"0": "MRI"}, "labels": names, "file_ending": ".nii.gz"})
        )
    return validation


def table(path: Path, dice: Mapping[str, np.ndarray], header: str = "case,class,dice", more: str = "") -> Path:
    lines = [f"{case},{c},{v[i]}{more}" for i, case in enumerate(CASES) for c, v in dice.items()]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def refusal(capfd: pytest.CaptureFixture[str], *runs: Path, output: Path | None = None) -> str:
    """The line of a comparison that is refused."""
    assert main(["compare", *map(str, runs), *(["--output", str(output)] if output else [])]) == 2
    said = capfd.readouterr()
    assert said.err.count("\n") == 1 and said.out == "", said
    return said.err


@pytest.fixture(autouse=True)
def empty_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are laid out, their files stay empty: test_figures.py renders some."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **form: path.touch())


def test_two_segmentations_are_paired_case_by_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written is Wilcoxon's test and the mean of the differences, class by class and of the cases' means."""
    one, other = dice_of(1), dice_of(2)
    segmentation(tmp_path / "teacher", one)
    segmentation(tmp_path / "untrained", other)
    runs, output = [str(tmp_path / name) for name in ("teacher", "untrained")], tmp_path / "out"
    assert main(["compare", *runs, "--output", str(output)]) == 0
    with (output / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(r["metric"], r["class"], r["run"], r["minus"]): r for r in rows}
    assert {key[1] for key in found} == {MEAN, *CLASSES}  # without the background
    assert {key[0] for key in found} == {"dice", "hd95_mm", "nsd_1mm", "volume_error_ml"}
    pairs = {c: (one[c], other[c]) for c in CLASSES}
    pairs[MEAN] = (np.mean(list(one.values()), axis=0), np.mean(list(other.values()), axis=0))
    for name, (a, b) in pairs.items():
        row, test = found["dice", name, "teacher", "untrained"], wilcoxon(a, b)
        assert float(row["mean"]) == pytest.approx((a - b).mean(), rel=1e-5)
        assert float(found["dice", name, "teacher", ""]["mean"]) == pytest.approx(a.mean(), rel=1e-5)
        assert (row["test"], float(row["p"])) == ("Wilcoxon", pytest.approx(test.p, rel=1e-5))
        assert float(row["effect_size"]) == pytest.approx(test.effect_size, rel=1e-5) and row["n"] == "12"
        assert float(row["bootstrap_low"]) < float(row["mean"]) < float(row["bootstrap_high"])
        assert float(row["t_low"]) < float(row["bootstrap_low"]) and float(row["smallest_p"]) == pytest.approx(
            2.0**-11, rel=1e-5
        )
    said = capsys.readouterr().out
    assert "2 runs, 12 test cases, classes anterior, posterior" in said and "teacher - untrained" in said
    assert "% (n = 12)" in said and "0.00049" in said
    with (output / "figures" / "means.csv").open() as file:
        drawn = {(r["what"], r["series"], r["minus"]): r for r in csv.DictReader(file)}
    assert len(drawn) == 4 * 3 and drawn["HD95 (mm)", "untrained", ""]["n"] == "12"
    for (metric, name, run, minus), row in found.items():
        if metric == "dice" and name == MEAN:
            own = drawn["Dice", run, minus]
            for column, of_table in (
                (("p", "p"), ("p_holm", "p_holm")) if minus else (("mean", "mean"), ("low", "bootstrap_low"))
            ):
                assert float(own[column]) == pytest.approx(float(row[of_table]), rel=1e-5)
    assert len(list((output / "figures").glob("classes_*.pdf"))) == 4 and (output / "figures" / "report.html").is_file()


def test_paired_differences_are_those_of_the_results_page(tmp_path: Path) -> None:
    """As `scripts/results/tables.py` makes docs/results.md: the mean of the differences, 2,000 draws of cases there."""
    cases = [f"c{i:02d}" for i in range(40)]
    one, other = dice_of(1, cases), dice_of(2, cases)
    runs = read_runs([segmentation(tmp_path / "a", one, cases), segmentation(tmp_path / "b", other, cases)])
    (row,) = [r for r in compare_results(runs) if (r.metric, r.name, r.minus) == ("dice", "anterior", "b")]
    gain = one["anterior"] - other["anterior"]
    (interval,) = bootstrap_interval(lambda rows: [gain[rows].mean()], [str(i) for i in range(40)])
    assert interval is not None and row.estimate.mean == pytest.approx(gain.mean())
    assert row.estimate.bootstrap == pytest.approx(interval, abs=0.1 * (interval[1] - interval[0]))


def test_holm_corrects_within_a_metric_the_mean_of_classes_apart(tmp_path: Path) -> None:
    runs = read_runs([segmentation(tmp_path / str(seed), dice_of(seed)) for seed in range(1, 4)])
    rows = [row for row in compare_results(runs) if row.metric == "dice" and row.outcome]
    assert [row.family for row in rows] == [3] * 3 + [6] * 6  # three pairs; of two classes
    least = min(rows[3:], key=lambda row: row.outcome.p if row.outcome else 2)
    assert least.outcome is not None and least.p_holm == pytest.approx(min(1, 6 * least.outcome.p))


def test_a_case_with_an_absent_class_is_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = dice_of(1), dice_of(2)
    one["anterior"][3] = other["anterior"][3] = other["anterior"][5] = math.nan
    paths = [segmentation(tmp_path / "a", one), segmentation(tmp_path / "b", other)]
    rows = {(r.name, r.shown): r for r in compare_results(read_runs(paths)) if r.metric == "dice"}
    assert [rows["anterior", name].not_counted for name in ("a", "b", "a - b")] == [1, 2, 2]
    both = [i for i in range(12) if i not in (3, 5)]
    assert rows["anterior", "a - b"].estimate.mean == pytest.approx((one["anterior"] - other["anterior"])[both].mean())
    means = np.where(np.arange(12) == 3, one["posterior"], (one["anterior"] + one["posterior"]) / 2)  # the other class alone
    assert (rows[MEAN, "a - b"].estimate.n, rows[MEAN, "a"].estimate.mean) == (12, pytest.approx(means.mean(), rel=1e-5))
    assert main(["compare", *map(str, paths)]) == 0
    assert "2 without a value" in capsys.readouterr().out


def test_nnunets_summary_beside_a_run_of_ours(tmp_path: Path) -> None:
    """Labels get the names of `dataset.json`, NaN is an absent class, counts of voxels are no metrics."""
    one, other = dice_of(1), dice_of(2)
    other["posterior"][0] = math.nan
    summary = nnunet(tmp_path / "nnUNetTrainer__3d_fullres", other, {"background": 0, "anterior": 1, "posterior": 2})
    ours, theirs = read_runs([segmentation(tmp_path / "ours", one), summary / "summary.json"])
    require_comparable([ours, theirs])
    assert theirs.name == "validation" and theirs.classes == CLASSES and list(theirs.values) == ["dice", "iou"]
    np.testing.assert_array_equal(theirs.values["dice"]["posterior"], other["posterior"])
    assert {row.metric for row in compare_results([ours, theirs])} == {"dice"}
    assert read_results(summary, "folder").values["dice"].keys() == theirs.values["dice"].keys()


def test_nnunets_regions_get_their_names_too(tmp_path: Path) -> None:
    summary = nnunet(tmp_path / "t", dice_of(1), {"background": 0, "whole": [1, 2], "core": [2]}) / "summary.json"
    summary.write_text(summary.read_text().replace('"1": {', '"(1, 2)": {'))
    assert read_results(summary, "n").classes == ("whole", "core")


def test_a_table_of_other_software_with_more_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns of numbers are metrics, text is not; a background by name, a byte order mark and any order of rows do no harm."""
    dice = dice_of(2)
    path = table(tmp_path / "vendor.csv", dice, "\ufeffcase,class,dice,scanner,assd", ",Siemens,0.4")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *reversed(lines[1:]), *(f"{case},Background,0.9,x,1" for case in CASES)]))
    found = read_results(path, "vendor")
    assert list(found.values) == ["dice", "assd"] and set(found.classes) == set(CLASSES)
    np.testing.assert_array_equal(found.values["dice"]["anterior"], dice["anterior"])
    assert main(["compare", str(segmentation(tmp_path / "ours", dice_of(1))), str(path)]) == 0
    said = capsys.readouterr().out
    assert (
        "ours - vendor" in said and "Left out, because not all runs have it: hd95_mm, nsd_1mm, volume_error_ml, assd." in said
    )


def test_surface_dice_of_another_tolerance_is_another_metric(tmp_path: Path) -> None:
    runs = read_runs([segmentation(tmp_path / "a", dice_of(1)), segmentation(tmp_path / "b", dice_of(2), tolerance=2.0)])
    assert {row.metric for row in compare_results(runs)} == {"dice", "hd95_mm", "volume_error_ml"}


def test_probes_are_compared_seed_by_seed_with_welchs_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = [0.81, 0.84, 0.79, 0.83, 0.80], [0.75, 0.80, 0.71, 0.78, 0.74]
    paths = [probe(tmp_path / "3dino", one), probe(tmp_path / "random", other)]
    rows = {(r.metric, r.shown): r for r in compare_results(read_runs(paths))}
    assert {metric for metric, _ in rows} == {"auc", "f1", "balanced_accuracy", "calibration_error"}
    row = rows["auc", "3dino - random"]
    assert row.outcome == welch(np.array(one), np.array(other)) and row.p_holm == row.outcome.p and row.name == ALL
    assert main(["compare", *map(str, paths)]) == 0
    said = capsys.readouterr().out
    assert "2 runs, 4 test cases, classes f, m" in said and "82.8 % (n = 5)" in said and "Welch" in said


def test_one_seed_has_no_p_value_and_the_record_no_bare_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [probe(tmp_path / "a", [0.8]), probe(tmp_path / "b", [0.7, 0.6, 0.9])]
    assert main(["compare", *map(str, paths), "--output", str(tmp_path / "out")]) == 0
    assert "no p-value: 1 and 3 seeds" in capsys.readouterr().out

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    assert "nan" not in (tmp_path / "out" / "comparison.csv").read_text()
    record = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=refuse)
    (row,) = [r for r in record["rows"] if r["metric"] == "auc" and r["minus"]]
    assert row["p"] is row["p_holm"] is row["t_low"] is row["holm_family"] is None and row["mean"] == pytest.approx(
        0.8 - 2.2 / 3
    )
    (mean,) = [r for r in record["rows"] if r["metric"] == "auc" and r["run"] == "b" and not r["minus"]]
    assert mean["t_low"] < mean["bootstrap_low"] < mean["bootstrap_high"] < mean["t_high"]
    assert record["runs"] == {"a": str(paths[0]), "b": str(paths[1])} and record["bootstrap_coverage"] == {"3": 0.747}


def test_regressions_are_compared_by_absolute_errors(tmp_path: Path) -> None:
    for name, predicted in (("a", [30.0, 41, 52]), ("b", [33.0, 44, 58])):
        (tmp_path / name).mkdir()
        write_predictions(
            tmp_path / name / "predictions.csv", list("xyz"), [31.0, 40.0, 50.0], {"predicted": np.array(predicted)}
        )
        write_json(tmp_path / name / "results.json", {"test_mae": 1.0})
    rows = {r.shown: r for r in compare_results(read_runs([tmp_path / "a", tmp_path / "b"]))}
    assert rows["a"].estimate.mean == pytest.approx(4 / 3) and rows["a - b"].estimate.mean == pytest.approx(4 / 3 - 14 / 3)
    assert rows["a"].metric == "absolute_error"


def test_names_are_those_of_folders_as_far_as_they_differ(tmp_path: Path) -> None:
    paths = [segmentation(tmp_path / part / "seg", dice_of(1)) for part in ("old", "new")]
    assert [run.name for run in read_runs(paths)] == ["old_seg", "new_seg"]
    assert [run.name for run in read_runs([paths[0] / "results.json", table(tmp_path / "x.csv", dice_of(1))])] == ["seg", "x"]


def without(path: Path, words: str) -> None:
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if words not in line))


def test_differing_test_items_are_refused_with_what_is_missing_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, other = segmentation(tmp_path / "one", dice_of(1)), segmentation(tmp_path / "other", dice_of(2))
    for case in CASES[:7]:
        without(other / "per_case.csv", case)
    without(one / "per_case.csv", CASES[9])
    said = refusal(capfd, one, other)
    assert "one lacks 1 of 12 (hippocampus_009)" in said
    assert "other lacks 7 of 12 (hippocampus_000, hippocampus_001" in said and "and 2 more)" in said
    assert "the same test part" in said


Change = Callable[[Path], object]
CHANGES: list[tuple[Change, str]] = [  # to the other run's folder; words of the refusal
    (lambda f: without(f / "per_case.csv", "posterior"), "classes differ: b lacks 1 of 2 (posterior)"),
    (lambda f: (f / "per_case.csv").unlink(), "per_case.csv: No such file or directory: give the whole folder"),
    (lambda f: (f / "results.json").unlink(), "is not finished: start its command again"),
    (lambda f: (f / "results.json").write_text('{"test": '), "is not valid JSON, perhaps half-written"),
    (lambda f: (f / "results.json").write_text("[]"), "holds a list, no results"),
    (lambda f: (f / "results.json").write_text("{}"), "is of no program whose runs are compared"),
    (lambda f: without(f / "per_case.csv", "hippocampus_003,anterior"), "case hippocampus_003 has no row of class anterior"),
    (lambda f: without(f / "per_case.csv", "hippocampus"), "has no rows"),
    (lambda f: without(f / "per_case.csv", "case,class"), "has no column case"),
    (lambda f: with_text(f, lambda t: t[: len(t) // 2].rpartition(",")[0]), "columns: it is damaged or half-written"),
    (lambda f: with_text(f, lambda t: t + t.splitlines()[-1] + "\n"), "comes twice"),
    (lambda f: with_text(f, lambda t: t.replace("posterior,0.", "posterior,O.", 1)), "no number: correct it"),
    (lambda f: with_text(f, lambda t: t.replace(",posterior,", ",,")), "has no class: complete it"),
    (lambda f: with_text(f, lambda t: t.replace("dice", "case", 1)), "two columns of one name"),
    (lambda f: with_text(f, lambda t: '"' + t), "cannot be read as CSV"),
    (lambda f: (f / "per_case.csv").write_bytes(b"\xff\xfe\x00"), "UTF-16"),
]


def with_text(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "per_case.csv"
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=[words[:40] for _, words in CHANGES])
def test_what_cannot_be_compared_is_one_line(
    change: Change, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, other = segmentation(tmp_path / "a", dice_of(1)), segmentation(tmp_path / "b", dice_of(2))
    change(other)
    assert words in refusal(capfd, one, other)


def test_an_infinite_distance_is_refused_by_its_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path / "x.csv", dice_of(1), "case,class,dice,hd95", ",1")
    path.write_text(path.read_text().replace(",1\n", ",inf\n", 1))
    said = refusal(capfd, segmentation(tmp_path / "a", dice_of(1)), path)
    assert "row 2: hd95 is infinite" in said


def test_nnunets_damaged_and_older_summaries_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ours = segmentation(tmp_path / "ours", dice_of(1))
    summary = nnunet(tmp_path / "t", dice_of(2), None) / "summary.json"
    whole = summary.read_text()
    assert "classes differ: ours lacks 2 of 4 (1, 2); validation lacks 2 of 4 (anterior, posterior)" in refusal(
        capfd, ours, summary
    )
    for text, words in (
        (whole[:500], "is not valid JSON"),
        ('{"results": {"all": []}}', "nnU-Net's version 2"),
        (whole.replace('"prediction_file"', '"file"', 1), "metric_per_case[0]: has no prediction_file"),
        (whole.replace('"Dice": 0', '"Dice": "0', 1).replace(', "IoU"', '", "IoU"', 1), "Dice of label 1 is "),
    ):
        summary.write_text(text)
        assert words in refusal(capfd, ours, summary)


def test_probes_of_other_people_labels_or_kinds_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = probe(tmp_path / "one", [0.8, 0.7])
    assert "one lacks 1 of 5 (d (m)); other lacks 1 of 5 (d (f))" in refusal(
        capfd, one, probe(tmp_path / "other", [0.8], "mfmm")
    )
    assert "values of seeds, seg of cases" in refusal(capfd, one, segmentation(tmp_path / "seg", dice_of(1)))
    (one / "seed_1" / "predictions.csv").write_text("case,label\na,m\n")
    assert "its seeds have different test cases" in refusal(capfd, one, tmp_path / "other")
    results = json.loads((one / "results.json").read_text())
    results["by_seed"]["test_auc"].pop()
    write_json(one / "results.json", results)
    assert "no test_auc of each of its 2 seeds: it is damaged" in refusal(capfd, one, tmp_path / "other")


def test_missing_runs_one_run_and_bad_outputs_are_refused_before_anything_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = segmentation(tmp_path / "one", dice_of(1))
    assert "one run has nothing to be compared with" in refusal(capfd, one)
    assert "given twice" in refusal(capfd, one, one / ".." / "one")
    assert "no such file or folder" in refusal(capfd, one, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no results of a run" in refusal(capfd, one, tmp_path / "empty")
    other = segmentation(tmp_path / "other", dice_of(2))
    (tmp_path / "file").write_text("x")
    refusal(capfd, one, other, output=tmp_path / "file")
    without(other / "per_case.csv", CASES[0])
    refusal(capfd, one, other, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
