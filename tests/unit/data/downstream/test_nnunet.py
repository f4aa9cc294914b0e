"""nnU-Net's raw folders become a list and a recipe that an evaluation reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from dinov2.cli import main
from dinov2.data.downstream.lists import SPLITS, Item, read_downstream_datalist
from dinov2.data.downstream.recipes import Recipe, load_recipe

V2 = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "anterior": 1, "posterior": 2},
    "numTraining": 5,
    "file_ending": ".nii.gz",
    "overwrite_image_reader_writer": "SimpleITKIO",
}
OLD = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "anterior", "2": "posterior"}, "numTraining": 5}


def lay_out(folder: Path, description: dict[str, Any], channels: int, numbered: bool = True, ending: str = ".nii.gz") -> Path:
    """Five cases as nnU-Net keeps them, and one without a label."""
    for i in range(5):
        numbers = [f"_{c:04}" for c in range(channels)] if numbered else [""]
        for path in (
            *(f"imagesTr/hip_{i}{n}{ending}" for n in numbers),
            f"labelsTr/hip_{i}{ending}",
            f"imagesTs/t_{i}_0000{ending}",
        ):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def split(folder: Path, *extra: str) -> int:
    output = folder.parent / "DATA" / "hip_100_datalist.json"
    return main(["split", "--nnunet", str(folder), "--output", str(output), *extra])


def written(folder: Path) -> tuple[Recipe, list[Item]]:
    data = folder.parent / "DATA"
    recipe = load_recipe(data / "hip.yaml")
    return recipe, [item for part in read_downstream_datalist(data, recipe).values() for item in part]


def test_a_data_set_of_version_2_becomes_list_and_recipe(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "Dataset004_Hippocampus", V2, 2)
    (folder / "imagesTr" / "hip_0_0002.nrrd").touch()  # another ending is none of the data set's
    assert split(folder) == 0
    recipe, items = written(folder)
    assert (recipe.task, recipe.channels, recipe.classes) == (
        "segmentation",
        2,
        {0: "background", 1: "anterior", 2: "posterior"},
    )
    item = next(item for item in items if item.case == "hip_3")
    assert item.images == tuple(str(folder / "imagesTr" / f"hip_3_000{c}.nii.gz") for c in range(2))
    assert item.label == str(folder / "labelsTr" / "hip_3.nii.gz") and len(items) == 5
    text = (tmp_path / "DATA" / "hip.yaml").read_text()
    assert "channels: 0 T1, 1 T2" in text and "window" not in text


@pytest.mark.parametrize("numbered", [True, False])
def test_the_older_form_lists_its_cases(tmp_path: Path, numbered: bool) -> None:
    """Version 1 leaves the channel's number out of the list, the Decathlon has none in the names either."""
    cases = [{"image": f"./imagesTr/hip_{i}.nii.gz", "label": f"./labelsTr/hip_{i}.nii.gz"} for i in range(4)]
    folder = lay_out(
        tmp_path / "Task004_Hippocampus", {**OLD, "training": cases, "test": ["./imagesTs/t_0.nii.gz"]}, 1, numbered
    )
    assert split(folder) == 0
    recipe, items = written(folder)
    assert recipe.channels == 1 and recipe.classes == {0: "background", 1: "anterior", 2: "posterior"}
    assert sorted(item.case for item in items) == [f"hip_{i}" for i in range(4)]
    assert Path(items[0].images[0]).exists()


def test_files_that_lie_elsewhere_are_listed_by_case(tmp_path: Path) -> None:
    listed = {
        f"c{i}": {
            "images": [f"imagesTr/hip_{i}_0001.nii.gz", f"imagesTr/hip_{i}_0000.nii.gz"],
            "label": f"labelsTr/hip_{i}.nii.gz",
        }
        for i in range(5)
    }
    folder = lay_out(tmp_path / "D", {**V2, "dataset": listed}, 2)
    assert split(folder) == 0
    item = next(item for item in written(folder)[1] if item.case == "c1")
    assert [Path(p).name for p in item.images] == ["hip_1_0001.nii.gz", "hip_1_0000.nii.gz"]


def test_voxels_that_nnunet_ignores_are_ignored(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "D", {**V2, "labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}}, 2)
    assert split(folder) == 0
    recipe = written(folder)[0]
    assert (recipe.classes, recipe.ignore) == ({0: "background", 1: "a", 2: "b"}, [3])


def test_names_with_several_values_become_regions(tmp_path: Path) -> None:
    labels = {"background": 0, "whole tumour": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    folder = lay_out(tmp_path / "D", {**V2, "labels": labels, "regions_class_order": [1, 2, 3]}, 2)
    assert split(folder) == 0
    recipe = written(folder)[0]
    assert recipe.regions == {"whole tumour": [1, 2, 3], "core": [2, 3], "enhancing": [3]} and recipe.values == (0, 1, 2, 3)


def test_the_window_of_ct_is_left_to_the_user_in_a_comment(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "D", {**V2, "channel_names": {"0": "CT"}}, 1)
    assert split(folder) == 0
    lines = (tmp_path / "DATA" / "hip.yaml").read_text().splitlines()
    comment = next(line for line in lines if "window: " in line)
    assert comment.startswith("# ") and written(folder)[0].intensity.window is None
    chosen = yaml.safe_load(comment.removeprefix("# "))
    (tmp_path / "DATA" / "hip.yaml").write_text("\n".join([*lines, yaml.safe_dump(chosen)]))
    assert written(folder)[0].intensity.window == [-175, 250]


def test_a_recipe_that_is_there_is_never_changed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = lay_out(tmp_path / "D", V2, 2)
    assert split(folder) == 0 and split(folder, "--seed", "1") == 0  # the same one may stay
    recipe, datalist = tmp_path / "DATA" / "hip.yaml", tmp_path / "DATA" / "hip_100_datalist.json"
    recipe.write_text(recipe.read_text() + "space: {spacing_mm: [1, 1, 1]}\n")
    before = recipe.read_text(), datalist.read_text()
    assert split(folder, "--seed", "2") == 2
    assert "hip.yaml: another recipe is there" in capfd.readouterr().err
    assert (recipe.read_text(), datalist.read_text()) == before


def test_real_volumes_of_an_nnunet_folder_pass_the_recipes_check(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "D", V2, 2)
    rng = np.random.default_rng(0)
    for path in sorted(folder.rglob("*.nii.gz")):
        label = np.zeros((36, 34, 33), np.uint8)
        label[8:20, 9:20, 10:20] = 1
        label[20:28, 9:20, 10:20] = 2
        voxels = label if path.parent.name == "labelsTr" else label * 50 + rng.uniform(0, 9, label.shape).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    assert split(folder, "--fractions", "0.4", "0.3", "0.3") == 0
    data = tmp_path / "DATA"
    assert (
        main(["recipe", "check", str(data / "hip.yaml"), "--base-data-dir", str(data), "--output-dir", str(tmp_path / "o")])
        == 0
    )


def test_patients_of_an_nnunet_folder_stay_together(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "D", V2, 2)
    for i in range(5):
        for path in list(folder.glob(f"*Tr/hip_{i}*")):
            path.rename(path.with_name(path.name.replace(f"hip_{i}", f"p{min(i, 2)}s{i}")))
    assert split(folder, "--patient", r"^(p\d)") == 0
    recipe = load_recipe(tmp_path / "DATA" / "hip.yaml")
    parts = read_downstream_datalist(tmp_path / "DATA", recipe)
    assert sorted(len(parts[s]) for s in SPLITS) == [1, 1, 3]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"labels": {"background": 0, "a": 1, "ignore": "2"}}, 'labels.ignore is "2"'),
        ({"labels": {"background": 0, "a": 1, "ignore": 1}}, "both have [1]"),
        ({"labels": {"background": 0, "a": 2}}, "named 0, 1, 2"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "two names have one value"),
        ({"labels": {"background": 0, "a": "one"}}, 'labels.a is "one"'),
        ({"labels": None}, "labels is null"),
        ({"channel_names": {"1": "T1"}}, "channel_names is"),
        ({"channel_names": {"0": "T1", "1": "T2", "2": "FLAIR"}}, "has 2 images for 3 channels"),
        ({"file_ending": ".png"}, 'file_ending ".png" is of no format'),
        ({"file_ending": ".nrrd"}, "holds no .nrrd image files"),
        ({"training": [{"image": "imagesTr/no.nii.gz", "label": "labelsTr/no.nii.gz"}]}, "no such file"),
        ({"training": ["imagesTr/no.nii.gz"]}, "its list of cases"),
    ],
)
def test_a_description_that_cannot_be_used_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    folder = lay_out(tmp_path / "D", {**V2, **change}, 2)
    assert split(folder) == 2
    said = capfd.readouterr().err
    assert words in said and said.count("\n") == 1, said
    assert not (tmp_path / "DATA").exists()


def test_a_folder_without_description_and_a_list_of_another_name_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert split(tmp_path / "nowhere") == 2
    assert "--nnunet" in capfd.readouterr().err
    folder = lay_out(tmp_path / "D", V2, 2)
    assert main(["split", "--nnunet", str(folder), "--output", str(tmp_path / "list.json")]) == 2
    assert "NAME_100_datalist.json" in capfd.readouterr().err
    both = ["--nnunet", str(folder), "--table", "t.csv"]
    assert main(["split", *both, "--output", str(tmp_path / "list.json")]) == 2
    assert "give --images and --labels, or --nnunet" in capfd.readouterr().err


def test_fewer_cases_than_the_description_says_are_warned_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = lay_out(tmp_path / "D", {**V2, "numTraining": 260}, 2)
    assert split(folder) == 0
    assert "numTraining is 260, 5 cases with a label are there" in capfd.readouterr().err
