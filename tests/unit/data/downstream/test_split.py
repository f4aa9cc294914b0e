"""Splits: seeded, by patients, of anyone's folders and of the published layouts; `dinov2 recipe check` says what is wrong."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from dinov2.cli import main
from dinov2.data.downstream.lists import SPLITS, read_downstream_datalist
from dinov2.data.downstream.recipes import load_recipe
from dinov2.data.downstream.split import counts_of_fractions, split_patients
from dinov2.errors import BadInput
from tests.conftest import ROOT


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def split(folder: Path, *extra: str) -> dict[str, Any]:
    """`dinov2 split` on `images` and `labels`."""
    command = [
        "split",
        "--images",
        str(folder / "images"),
        "--labels",
        str(folder / "labels"),
        "--output",
        str(folder / "l.json"),
    ]
    assert main([*command, *extra]) == 0
    return json.loads((folder / "l.json").read_text())


def cases(content: dict[str, Any]) -> dict[str, list[str]]:
    return {part: [row["case"] for row in content[part]] for part in SPLITS}


# ---------------------------------------------------------------------- anyone's folders


def test_a_split_is_seeded_whole_and_shuffled_with_the_seed_recorded(tmp_path: Path) -> None:
    names = [f"scan{i:02}.nii.gz" for i in range(20)]
    touch(tmp_path / "images", *names)
    touch(tmp_path / "labels", *names)
    one, same, other = (split(tmp_path, "--seed", s) for s in ("1", "1", "2"))
    assert one == same and cases(one) != cases(other) and one["shuffle_seed"] == 1
    assert [len(one[part]) for part in SPLITS] == [14, 2, 4]
    assert sorted(c for part in cases(one).values() for c in part) == [n.split(".")[0] for n in names]
    assert cases(one)["training"] != sorted(cases(one)["training"])
    row = one["test"][0]
    assert (row["image"], row["label"]) == (f"images/{row['case']}.nii.gz", f"labels/{row['case']}.nii.gz")


def test_a_list_beside_its_data_is_relative_and_moves_with_it(tmp_path: Path) -> None:
    names = [f"{i}.nii.gz" for i in range(5)]
    touch(tmp_path / "set" / "images", *names)
    touch(tmp_path / "set" / "labels", *names)
    flags = ["--images", str(tmp_path / "set" / "images"), "--labels", str(tmp_path / "set" / "labels")]
    assert main(["split", *flags, "--output", str(tmp_path / "set" / "lists" / "d_100_datalist.json")]) == 0
    (tmp_path / "d.yaml").write_text("classes: {0: background, 1: core}\n")
    (tmp_path / "set").rename(tmp_path / "moved")
    items = read_downstream_datalist(tmp_path / "moved" / "lists", load_recipe(tmp_path / "d.yaml"))
    assert {Path(i.images[0]).parent for part in items.values() for i in part} == {tmp_path / "moved" / "images"}


@pytest.mark.parametrize("form, flags", [("sub-{}_ses-{}_T1w.nii", []), ("pat{}v{}.nrrd", ["--patient", r"^(pat\d+)v"])])
def test_a_patients_scans_stay_in_one_part(tmp_path: Path, form: str, flags: list[str]) -> None:
    names = [form.format(f"{p:02}", s) for p in range(10) for s in range(3)]
    touch(tmp_path / "images", *names)
    touch(tmp_path / "labels", *names)
    content = split(tmp_path, *flags)
    patients = [{row["patient"] for row in content[part]} for part in SPLITS]
    assert [len(p) for p in patients] == [7, 1, 2] and len(set.union(*patients)) == 10
    assert [len(content[part]) for part in SPLITS] == [21, 3, 6]


def test_nnunets_folders_give_their_channels(tmp_path: Path) -> None:
    touch(tmp_path / "images", *(f"liver_{i}_000{c}.nii.gz" for i in range(5) for c in range(2)))
    touch(tmp_path / "labels", *(f"liver_{i}.nii.gz" for i in range(5)))
    row = split(tmp_path)["training"][0]
    files = [f"images/{row['case']}_000{c}.nii.gz" for c in range(2)]
    assert [row["image1"], row["image2"], row["label"]] == [*files, f"labels/{row['case']}.nii.gz"]


def test_four_digits_that_are_no_channel_stay_in_the_name(tmp_path: Path) -> None:
    names = [f"case_{i:04}.nii.gz" for i in range(5)]
    touch(tmp_path / "images", *names)
    touch(tmp_path / "labels", *names)
    assert sum(map(len, cases(split(tmp_path)).values())) == 5


def test_a_fixed_split_is_kept(tmp_path: Path) -> None:
    names = [f"{c}.nii.gz" for c in "abcdef"]
    touch(tmp_path / "images", *names)
    touch(tmp_path / "labels", *names)
    fixed = {"set": {"training": ["c.nii.gz", "a.nii.gz"], "validation": ["f.nii.gz"], "test": ["e.nii.gz"]}}
    (tmp_path / "parts.json").write_text(json.dumps(fixed))
    content = split(tmp_path, "--parts", str(tmp_path / "parts.json"), "--parts-key", "set")
    assert {part: sorted(names) for part, names in cases(content).items()} == {
        "training": ["a", "c"], "validation": ["f"], "test": ["e"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "remove, flags, words",
    [
        ("images/2.nii.gz", [], ["2.nii.gz has no image"]),
        ("images", [], ["--images", "No such file"]),
        ("labels/*", [], ["--labels", "no image files"]),
        (None, ["--fractions", "0.5", "0.5", "0.5"], ["--fractions 0.5 0.5 0.5", "add up to 1"]),
        (None, ["--patient", r"^(pat\d+)"], ["--patient", "does not match '0'"]),
        (None, ["--patient", "["], ["not a regular expression"]),
        (None, ["--patient", r"\d"], ["one group"]),
        (None, ["--parts", "nowhere.json"], ["--parts nowhere.json"]),
        ("?*s/[1-9].nii.gz", [], ["1 patients cannot be split"]),
    ],
)
def test_folders_that_cannot_be_split_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], remove: str | None, flags: list[str], words: list[str]
) -> None:
    for folder in ("images", "labels"):
        touch(tmp_path / folder, *(f"{i}.nii.gz" for i in range(6)))
    for path in sorted(tmp_path.glob(remove)) if remove else []:
        path.rename(tmp_path / "gone") if path.is_dir() else path.unlink()
    command = ["split", "--images", f"{tmp_path}/images", "--labels", f"{tmp_path}/labels", "--output", f"{tmp_path}/l.json"]
    assert main([*command, *flags]) == 2
    said = capsys.readouterr().err
    assert not [w for w in words if w not in said] and not (tmp_path / "l.json").exists(), said


def test_every_part_has_a_patient() -> None:
    assert counts_of_fractions(3, [0.98, 0.01, 0.01]) == [1, 1, 1]
    assert counts_of_fractions(1084, [0.7, 0.1, 0.2]) == [759, 108, 217]
    assert counts_of_fractions(4, [0.2, 0.4, 0.4])[0] >= 1
    with pytest.raises(ValueError, match="there are 2"):
        split_patients([{"case": "a"}, {"case": "b"}], (1, 1, 1), 0)


# ---------------------------------------------------------------------- the published layouts


def script() -> Any:
    spec = importlib.util.spec_from_file_location("datalist", ROOT / "scripts" / "datasets" / "datalist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lay_out(name: str, folder: Path) -> None:
    """Empty files as the publisher names them."""
    if name == "BTCV":
        numbers = [*range(1, 11), *range(21, 41)]
        touch(folder / "Training", *(f"{d}/{d}{i:04}.nii.gz" for i in numbers for d in ("img", "label")))
        touch(folder / "Testing", *(f"img/img{i:04}.nii.gz" for i in range(61, 81)))
    elif name == "LA-SEG":
        for part, count in (("Training Set", 100), ("Testing Set", 54)):
            files = ("lgemri.nrrd", "laendo.nrrd", "lawall.nrrd")
            touch(folder / part, *(f"{part[:2]}{i:03}/{f}" for i in range(count) for f in files))
    elif name == "TDSC-ABUS":
        touch(folder / "Train", *(f"{d}/{d}_{i:03}.nrrd" for i in range(100) for d in ("DATA", "MASK")), "labels.csv")
    else:
        contrasts = ("flair", "t1", "t1ce", "t2", "seg")
        names = [f"BraTS2021_{i:05}" for i in range(1251)]
        touch(folder, *(f"{n}/{n}_{c}.nii.gz" for n in names for c in contrasts))
        collections = ["TCGA-GBM"] * 102 + ["TCGA-LGG"] * 65 + ["UPENN-GBM"] * 400 + [""] * 684
        rows = [f"{c},{i},{n}" for i, (c, n) in enumerate(zip(collections, names, strict=True))]
        (folder / "mapping.csv").write_text("\n".join(["Data Collection,Site No,BraTS2021", *rows]) + "\n")


COUNTS = {"BTCV": (20, 4, 6), "BraTS": (758, 108, 218), "LA-SEG": (80, 20, 54), "TDSC-ABUS": (70, 10, 20)}


@pytest.mark.parametrize("name", list(COUNTS))
def test_a_published_layout_becomes_a_list_with_the_papers_counts(name: str, tmp_path: Path) -> None:
    lay_out(name, tmp_path)
    mapping = tmp_path / "mapping.csv" if name == "BraTS" else None
    path = script().make(name, tmp_path, tmp_path, 0, mapping)
    recipe = load_recipe(name)
    items = read_downstream_datalist(tmp_path, recipe)
    assert path.name == f"{name}_100_datalist.json" and tuple(len(items[s]) for s in SPLITS) == COUNTS[name]
    everything = [item for part in items.values() for item in part]
    assert all(len(item.images) == recipe.channels for item in everything)
    if name == "BraTS":
        assert min(item.case for item in everything) == "BraTS2021_00167"  # none of TCGA
        assert [Path(p).name.split("_")[-1] for p in everything[0].images] == [
            "flair.nii.gz",
            "t1.nii.gz",
            "t1ce.nii.gz",
            "t2.nii.gz",
        ]
    if name == "LA-SEG":
        assert all("Testing Set" in item.images[0] for item in items["test"])
        assert not any("Testing Set" in item.images[0] for part in ("training", "validation") for item in items[part])
    first = path.read_text()
    script().make(name, tmp_path, tmp_path, 0, mapping)
    assert path.read_text() == first
    script().make(name, tmp_path, tmp_path, 1, mapping)
    assert path.read_text() != first


def test_an_incomplete_published_set_is_refused(tmp_path: Path) -> None:
    lay_out("BTCV", tmp_path)
    (tmp_path / "Training" / "img" / "img0003.nii.gz").unlink()
    with pytest.raises(BadInput, match=r"29 cases, the paper has 30.*img0001"):
        script().make("BTCV", tmp_path, tmp_path, 0, None)
    with pytest.raises(BadInput, match="needs --name-mapping"):
        script().make("BraTS", tmp_path, tmp_path, 0, None)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="no row names TCGA"):
        script().make("BraTS", tmp_path, tmp_path, 0, tmp_path / "other.csv")


# ---------------------------------------------------------------------- recipe check


def brain_set(folder: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Path:
    """A recipe and three cases: a bright ball in a dark room."""
    for i in range(3):
        place = np.indices((40, 36, 34)) - np.array([18, 18, 16 + i]).reshape(3, 1, 1, 1)
        distance = np.sqrt((place**2).sum(0))
        image, label = change(np.where(distance < 14, 100 + distance, 0).astype(np.float32), (distance < 6).astype(np.uint8))
        for name, voxels in (("images", image), ("labels", label)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, 1.2, 1])), folder / name / f"{i}.nii.gz")
    (folder / "ball.yaml").write_text("classes: {0: background, 1: core}\nintensity: {window: [0, 120]}\n")
    split = [
        "split",
        "--images",
        f"{folder}/images",
        "--labels",
        f"{folder}/labels",
        "--output",
        f"{folder}/ball_100_datalist.json",
    ]
    assert main(split) == 0
    return folder / "ball.yaml"


def check(recipe: Path, output: Path) -> int:
    return main(["recipe", "check", str(recipe), "--base-data-dir", str(recipe.parent), "--output-dir", str(output)])


def test_a_sound_set_is_described_and_drawn_without_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = brain_set(tmp_path, lambda image, label: (image, label))
    capsys.readouterr()
    assert check(recipe, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "0 warnings from 3 cases" in out and "1 training, 1 validation, 1 test" in out
    assert "40 x 36 x 34 voxels of 1 x 1 x 1.2 mm" in out and "core 1." in out and "at -1" in out
    pictures = sorted((tmp_path / "out").iterdir())
    assert [p.name for p in pictures] == ["0.png", "1.png", "2.png"]
    colours = np.asarray(Image.open(pictures[0]).convert("RGB")).astype(int)
    assert (colours.max(-1) - colours.min(-1) > 60).sum() > 100  # outlines of the label over the grey image


@pytest.mark.parametrize(
    "change, recipe, words",
    [
        (lambda i, m: (i, np.roll(m, 17, 0)), "", "labelled voxels are at the lowest intensity"),
        (lambda i, m: (i, m * 0), "", "nothing is labelled"),
        (lambda i, m: (i, m), "classes: {0: background, 1: core, 2: rim}", "rim is in none of the 3 cases"),
        (lambda i, m: (i, m), "intensity: {window: [1000, 2000]}", "almost all clipped"),
        (lambda i, m: (i, m), "space: {spacing_mm: [1, 1, 6]}", "spacing 6 mm against 1 mm"),
        (lambda i, m: (i, m), "space: {spacing_mm: [1, 1, 3]}", "voxels along an axis"),
    ],
)
def test_what_looks_wrong_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, recipe: str, words: str
) -> None:
    path = brain_set(tmp_path, change)
    if recipe:
        kept = [line for line in path.read_text().splitlines() if line.split(":")[0] != recipe.split(":")[0]]
        path.write_text("\n".join([*kept, recipe]) + "\n")
    assert check(path, tmp_path / "out") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ") and words in line]


def test_a_case_that_cannot_be_used_ends_the_check_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = brain_set(tmp_path, lambda image, label: (image, label * 3))
    assert check(recipe, tmp_path / "out") == 2
    assert "label values 3 are not among ball's 0, 1" in capsys.readouterr().err


def test_a_recipe_for_regression_is_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    brain_set(tmp_path, lambda image, label: (image, label))
    table = ["image,age", *(f"images/{i}.nii.gz,{30 + i}" for i in range(3))]
    (tmp_path / "people.csv").write_text("\n".join(table) + "\n")
    (tmp_path / "age.yaml").write_text("task: regression\n")
    listed = ["--label-column", "age", "--output", str(tmp_path / "age_cls_datalist.json")]
    assert main(["split", "--table", str(tmp_path / "people.csv"), *listed]) == 0
    assert check(tmp_path / "age.yaml", tmp_path / "out") == 0
    assert "1 outputs: value" in capsys.readouterr().out


@pytest.mark.data
def test_the_local_hippocampus_split_becomes_the_datasets_list(local_data: Path, tmp_path: Path) -> None:
    folder = local_data / "hippocampus"
    command = ["split", "--images", str(folder / "images"), "--labels", str(folder / "labels")]
    parts = ["--parts", str(local_data / "splits.json"), "--parts-key", "hippocampus"]
    assert main([*command, *parts, "--output", str(tmp_path / "MSD-Hippocampus_100_datalist.json")]) == 0
    items = read_downstream_datalist(tmp_path, load_recipe("MSD-Hippocampus"))
    fixed = json.loads((local_data / "splits.json").read_text())["hippocampus"]
    assert {s: sorted(f"{i.case}.nii.gz" for i in items[s]) for s in SPLITS} == {s: sorted(fixed[s]) for s in SPLITS}
    assert (
        main(["recipe", "check", "MSD-Hippocampus", "--base-data-dir", str(tmp_path), "--output-dir", str(tmp_path / "o")]) == 0
    )
