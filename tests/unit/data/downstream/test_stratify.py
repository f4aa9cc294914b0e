"""Parts and folds have the same shares of labels, never a patient twice, and depend on the seed alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinov2.cli import main
from dinov2.data.downstream.lists import SPLITS, read_downstream_datalist
from dinov2.data.downstream.recipes import load_recipe
from dinov2.data.downstream.split import split_patients
from dinov2.data.downstream.stratify import fold_parts, stratified_parts

SHARES = (0.7, 0.1, 0.2)
Row = dict[str, Any]


def scans_of(labels: list[Any], scans: int = 1) -> list[Row]:
    """Each label's person with one scan, or with one up to several."""
    return [
        {"case": f"{p:04}-{s}", "patient": f"p{p:04}", "label": label}
        for p, label in enumerate(labels)
        for s in range(1 + p % scans)
    ]


def patients_of(rows: list[Row]) -> set[str]:
    return {row["patient"] for row in rows}


def share_of(rows: list[Row], label: Any) -> float:
    return sum(row["label"] == label for row in rows) / len(rows)


# ---------------------------------------------------------------------- parts


@pytest.mark.parametrize("seed", range(3))
def test_a_classs_share_is_the_same_in_every_part(seed: int) -> None:
    rows = scans_of(["ill"] * 20 + ["well"] * 180)
    parts = stratified_parts(rows, SHARES, seed)
    assert [len(parts[split]) for split in SPLITS] == [140, 20, 40]
    assert [share_of(parts[split], "ill") for split in SPLITS] == [0.1, 0.1, 0.1]
    by_chance = [split_patients(rows, (140, 20, 40), s)["validation"] for s in range(20)]
    assert len({share_of(part, "ill") for part in by_chance}) > 2  # what is dealt out without looking


@pytest.mark.parametrize("seed", range(3))
def test_patients_with_several_scans_stay_together_and_labels_alike(seed: int) -> None:
    rows = scans_of([i % 3 for i in range(150)], scans=4)
    parts = stratified_parts(rows, SHARES, seed)
    people = [patients_of(parts[split]) for split in SPLITS]
    assert sum(map(len, people)) == len(set.union(*people)) == 150
    sizes = np.array([len(parts[split]) for split in SPLITS]) / len(rows)
    assert np.abs(sizes - SHARES).max() < 0.02
    for label in range(3):
        assert max(abs(share_of(parts[split], label) - share_of(rows, label)) for split in SPLITS) < 0.06


def test_a_person_with_scans_of_several_labels_is_in_one_part() -> None:
    rows = [{"case": f"{p}-{v}", "patient": p, "label": "ab"[v]} for p in range(40) for v in range(2)]
    parts = stratified_parts(rows, SHARES, 0)
    assert [len(patients_of(parts[split])) for split in SPLITS] == [28, 4, 8]
    assert all(share_of(parts[split], "a") == 0.5 for split in SPLITS)


def test_a_rare_class_is_in_every_part_where_its_cases_suffice() -> None:
    parts = stratified_parts(scans_of(["rare"] * 3 + ["usual"] * 97), SHARES, 0)
    assert all(any(row["label"] == "rare" for row in parts[split]) for split in SPLITS)


@pytest.mark.parametrize("labels", [["a", "b"] * 5, [f"{i % 30}?" for i in range(180)]])
def test_parts_keep_their_sizes_where_classes_are_smaller_than_the_cut(labels: list[str]) -> None:
    parts = stratified_parts(scans_of(labels), SHARES, 0)
    assert [len(parts[split]) / len(labels) for split in SPLITS] == pytest.approx(SHARES, abs=0.011)


def test_numbers_are_alike_by_their_quantiles() -> None:
    rng = random.Random(0)
    rows = scans_of([round(rng.lognormvariate(3, 1), 1) for _ in range(300)])
    parts = stratified_parts(rows, SHARES, 0)
    medians, spreads = zip(
        *((np.median(v), np.quantile(v, 0.9)) for v in ([r["label"] for r in parts[s]] for s in SPLITS)), strict=True
    )
    by_chance = [[r["label"] for r in split_patients(rows, (210, 30, 60), s)["validation"]] for s in range(20)]
    assert max(medians) - min(medians) < np.ptp([np.median(v) for v in by_chance]) / 3
    assert max(spreads) / min(spreads) < 1.35
    assert [len(parts[split]) for split in SPLITS] == pytest.approx([210, 30, 60], abs=3)


@pytest.mark.parametrize("labels", [["a", "b"] * 30, [i / 3 for i in range(60)], list(range(60)), [0, 1, 2] * 20])
def test_parts_depend_on_the_seed_and_not_on_the_order_of_the_lines(labels: list[Any]) -> None:
    rows = scans_of(labels, scans=2)
    mixed = random.Random(1).sample(rows, len(rows))
    one = stratified_parts(rows, SHARES, 0)
    assert one == stratified_parts(mixed, SHARES, 0) != stratified_parts(rows, SHARES, 1)
    assert fold_parts(rows, 4, 0, True) == fold_parts(mixed, 4, 0, True) != fold_parts(rows, 4, 1, True)


@pytest.mark.parametrize("fractions", [SHARES, (0.1, 0.1, 0.8), (0.98, 0.01, 0.01), (0.34, 0.33, 0.33)])
@pytest.mark.parametrize("scans", [1, 9])
def test_three_patients_suffice(fractions: tuple[float, ...], scans: int) -> None:
    rows = [{"case": f"{p}{s}", "patient": p, "label": 30 + p} for p in range(3) for s in range(scans if p == 0 else 1)]
    parts = stratified_parts(rows, fractions, 0)
    assert [len(patients_of(parts[split])) for split in SPLITS] == [1, 1, 1]


@pytest.mark.parametrize("fractions", [(0.5, 0.25, 0.25), (0.63, 0.13, 0.24), (0.92, 0.04, 0.04), (0.1, 0.3, 0.6)])
def test_any_fractions_are_met(fractions: tuple[float, ...]) -> None:
    parts = stratified_parts(scans_of(["a", "b", "b", "c"] * 50), fractions, 0)
    assert [len(parts[split]) / 200 for split in SPLITS] == pytest.approx(fractions, abs=0.02)


def test_a_tables_parts_are_stratified_and_any_order_of_its_lines_gives_the_same(tmp_path: Path) -> None:
    lines = [f"sub-{i:02}.nii,{'ill' if i % 4 == 0 else 'well'}" for i in range(40)]
    for line in lines:
        (tmp_path / line.partition(",")[0]).touch()
    written = []
    for ordered in (lines, random.Random(1).sample(lines, 40)):
        (tmp_path / "t.csv").write_text("\n".join(["image,label", *ordered]) + "\n")
        assert main(["split", "--table", str(tmp_path / "t.csv"), "--output", str(tmp_path / "l.json")]) == 0
        written.append((tmp_path / "l.json").read_text())
    content = json.loads(written[0])
    assert written[0] == written[1]
    assert [sum(row["label"] == "ill" for row in content[split]) for split in SPLITS] == [7, 1, 2]


# ---------------------------------------------------------------------- folds


@pytest.mark.parametrize("num_folds", [3, 5])
def test_each_case_is_tested_once_and_validates_once(num_folds: int) -> None:
    rows = scans_of([i % 2 for i in range(60)], scans=3)
    folds = fold_parts(rows, num_folds, 0, by_label=True)
    for split in ("validation", "test"):
        assert sorted(row["case"] for fold in folds for row in fold[split]) == sorted(row["case"] for row in rows)
    for i, fold in enumerate(folds):
        people = [patients_of(fold[split]) for split in SPLITS]
        assert sum(map(len, people)) == len(set.union(*people)) == 60
        assert fold["validation"] == folds[(i + 1) % num_folds]["test"]
        assert abs(share_of(fold["test"], 1) - share_of(rows, 1)) < 0.06


def test_folds_of_images_are_of_one_size_by_patients() -> None:
    rows = [{**row, "label": f"{row['case']}.nii"} for row in scans_of([0] * 50, scans=4)]
    folds = fold_parts(rows, 5, 0, by_label=False)
    sizes = [len(fold["test"]) for fold in folds]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == len(rows)
    often = [{"case": f"often-{s}", "patient": "often", "label": "l.nii"} for s in range(30)]
    for seed in range(3):  # whoever has most scans comes first: what the others have evens the folds out
        folds = fold_parts([*often, *scans_of(["l.nii"] * 60)], 3, seed, by_label=False)
        assert [len(fold["test"]) for fold in folds] == [30, 30, 30]


def evaluable(folder: Path, recipe: Path, fold: int) -> dict[str, list[str]]:
    items = read_downstream_datalist(folder / f"fold{fold}", load_recipe(recipe))
    return {split: [item.case for item in items[split]] for split in SPLITS}


def test_folds_of_a_table_are_lists_that_an_evaluation_reads(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    lines = [f"scans/sub-{i // 2:02}_{i % 2}.nii,{'fm'[i // 2 % 2]}" for i in range(40)]
    for line in lines:
        (tmp_path / line.split(",")[0]).touch()
    (tmp_path / "t.csv").write_text("\n".join(["image,label", *lines]) + "\n")
    (tmp_path / "sex.yaml").write_text("task: classification\nclasses: {0: f, 1: m}\n")
    command = ["split", "--table", str(tmp_path / "t.csv"), "--output", str(tmp_path / "sex_cls_datalist.json"), "--folds", "5"]
    assert main(command) == 0
    folds = [evaluable(tmp_path, tmp_path / "sex.yaml", i) for i in range(5)]
    assert Counter(case for fold in folds for case in fold["test"]) == Counter({Path(x.split(",")[0]).stem: 1 for x in lines})
    content = json.loads((tmp_path / "fold2" / "sex_cls_datalist.json").read_text())
    assert content["test"][0]["image"].startswith("../scans/") and content["shuffle_seed"] == 0
    lists = [json.loads((tmp_path / f"fold{i}" / "sex_cls_datalist.json").read_text()) for i in range(5)]
    assert [sum(row["label"] == "f" for row in each["test"]) for each in lists] == [4] * 5
    assert not (tmp_path / "sex_cls_datalist.json").exists()


def test_folds_of_an_nnunet_folder_share_a_recipe(tmp_path: Path) -> None:
    for i in range(6):
        for path in (tmp_path / f"D/imagesTr/c{i}_0000.nii.gz", tmp_path / f"D/labelsTr/c{i}.nii.gz"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "D" / "dataset.json").write_text(json.dumps(description))
    output = tmp_path / "D" / "d_100_datalist.json"
    assert main(["split", "--nnunet", str(tmp_path / "D"), "--output", str(output), "--folds", "3"]) == 0
    folds = [evaluable(tmp_path / "D", tmp_path / "D" / "d.yaml", i) for i in range(3)]
    assert sorted(case for fold in folds for case in fold["test"]) == [f"c{i}" for i in range(6)]
    assert json.loads((tmp_path / "D" / "fold0" / output.name).read_text())["test"][0]["image"].startswith("../imagesTr/")


def table_of_six(folder: Path) -> None:
    for i in range(6):
        (folder / f"{i}.nii").touch()
    (folder / "t.csv").write_text("image,label\n" + "".join(f"{i}.nii,a\n" for i in range(6)))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--folds", "2"], "--folds 2: give from 3 to the number of patients, 6"),
        (["--folds", "7"], "--folds 7: give from 3"),
        (["--folds", "3", "--fractions", "0.5", "0.2", "0.3"], "leave out --fractions"),
        (["--folds", "3", "--parts", "p.json"], "leave out --fractions and --parts"),
        (["--fractions", "0.5", "0.2", "0.2"], "add up to 1"),
    ],
)
def test_folds_that_cannot_be_made_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    table_of_six(tmp_path)
    assert main(["split", "--table", str(tmp_path / "t.csv"), "--output", str(tmp_path / "l.json"), *flags]) == 2
    said = capfd.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "l.json").exists(), said


def test_a_fold_of_an_earlier_split_into_more_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table_of_six(tmp_path)
    command = ["split", "--table", str(tmp_path / "t.csv"), "--output", str(tmp_path / "l.json"), "--folds"]
    assert main([*command, "4"]) == 0 and "earlier" not in capfd.readouterr().err
    assert main([*command, "3"]) == 0
    assert "fold3/l.json is of an earlier split into more folds" in capfd.readouterr().err
