"""Downstream datalists and cases: checked before anything runs, exact there and back, never stale from the cache."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from dinov2.data.downstream.cases import Case, Cases, check_headers, prepare_case, restore_prediction
from dinov2.data.downstream.lists import SPLITS, Item, read_downstream_datalist, select_percent, write_downstream_datalist
from dinov2.data.downstream.recipes import Intensity, Recipe, Space, load_recipe
from dinov2.data.volumes.grids import GridMap
from dinov2.errors import BadInput
from dinov2.features.scans import load_scan

SHAPE = (14, 12, 10)  # of the scene, R A S
ORIENTATIONS = ["RAS", "LPS", "PIR", "SLA"]
LIVER = Recipe(classes={0: "background", 1: "liver", 2: "lesion"}, label_map={255: 2}, name="liver")
TWO = dataclasses.replace(LIVER, channels=2, name="two")


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image and its label map with no symmetry, R A S."""
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    label[2:7, 3:6, 1:5] = 1
    label[4:9, 5:11, 4:9] = 2
    return (rng.normal(size=SHAPE) * 20 + 100 * label).astype(np.float32), label


def save(
    path: Path, voxels: np.ndarray, axes: str = "RAS", spacing_mm: tuple[float, float, float] = (1, 1, 1), qform: int = 1
) -> str:
    """A scene given in R A S, stored with its axes pointing elsewhere; spacing along R A S."""
    affine = nib.affines.from_matvec(np.diag(spacing_mm), [-20, 7, 3])
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(axes)))
    stored = nib.orientations.apply_orientation(voxels, turn)
    image = nib.Nifti1Image(stored, affine @ nib.orientations.inv_ornt_aff(turn, voxels.shape[:3]))
    image.set_qform(image.affine, qform)
    image.set_sform(image.affine, 2)
    image.header["descrip"] = b"scanner one"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return str(path)


def saved_case(folder: Path, axes: str = "RAS", spacing_mm: tuple[float, float, float] = (1, 1, 1), seed: int = 0) -> Item:
    image, label = scene(seed)
    paths = save(folder / "image.nii.gz", image, axes, spacing_mm), save(folder / "label.nii.gz", label, axes, spacing_mm)
    return Item((paths[0],), paths[1], "one")


# ---------------------------------------------------------------------- there and back


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_a_case_is_the_same_however_it_is_stored(tmp_path: Path, axes: str) -> None:
    spacing = (0.8, 1.0, 2.5)
    case = prepare_case(saved_case(tmp_path, axes, spacing), LIVER)
    image, label = scene()
    assert case.image.shape == (1, *SHAPE) and case.image.dtype == torch.float32 and case.label.dtype == torch.int16
    assert np.array_equal(case.label[0].numpy(), label)
    low, high = np.percentile(image, (0.05, 99.95))
    expected = np.clip((image - low) / (high - low) * 2 - 1, -1, 1)
    assert np.abs(case.image[0].numpy() - expected).max() < 2e-5  # 16 bits
    assert case.spacing_mm == pytest.approx(spacing)
    assert np.allclose(case.affine, nib.affines.from_matvec(np.diag(spacing), [-20, 7, 3]))


@pytest.mark.parametrize("axes", ORIENTATIONS)
@pytest.mark.parametrize("ending", [".nii.gz", ".mgz"])
def test_a_label_map_goes_there_and_back_exactly_with_the_files_header(tmp_path: Path, axes: str, ending: str) -> None:
    """At the file's own spacing; unequal spacing and shape, so that swapped axes fail."""
    item = saved_case(tmp_path, axes, (0.8, 1.0, 2.5))
    if ending == ".mgz":
        source = nib.load(item.images[0])
        nib.save(nib.MGHImage(np.asanyarray(source.dataobj), source.affine), tmp_path / "image.mgz")
        item = dataclasses.replace(item, images=(str(tmp_path / "image.mgz"),))
    case = prepare_case(item, LIVER)
    nib.save(restore_prediction(case.label, case), tmp_path / "prediction.nii.gz")
    back, source, truth = (nib.load(p) for p in (tmp_path / "prediction.nii.gz", item.images[0], item.label))
    assert np.array_equal(np.asanyarray(back.dataobj), np.asanyarray(truth.dataobj)) and back.get_data_dtype() == np.uint8
    assert np.array_equal(back.affine, source.affine)
    if ending == ".nii.gz":
        kept = ("qform_code", "sform_code", "pixdim", "xyzt_units", "descrip", "quatern_b", "qoffset_x", "srow_x")
        assert all(np.array_equal(back.header[k], source.header[k]) for k in kept)


@pytest.mark.parametrize("axes", ["RAS", "PIR"])
def test_a_resampled_prediction_comes_back_to_within_half_a_voxel(tmp_path: Path, axes: str) -> None:
    recipe = dataclasses.replace(LIVER, space=Space(spacing_mm=[0.5, 1.25, 0.7]))
    item = saved_case(tmp_path, axes, (1.0, 1.0, 2.0))
    case = prepare_case(item, recipe)
    assert case.image.shape[1:] == case.label.shape[1:] == case.grid.shape == (27, 10, 27)
    back = np.asanyarray(restore_prediction(case.label, case).dataobj)
    truth = np.asanyarray(nib.load(item.label).dataobj)
    assert back.shape == truth.shape
    edge = np.zeros_like(truth, bool)  # voxels with a neighbour of another label
    for axis in range(3):
        change = np.diff(truth, axis=axis) != 0
        edge |= np.insert(change, 0, False, axis) | np.insert(change, change.shape[axis], False, axis)
    assert np.array_equal(back[~edge], truth[~edge])


def test_the_scale_divides_the_spacing(tmp_path: Path) -> None:
    item = saved_case(tmp_path, "LPS", (1.0, 1.0, 2.0))
    recipe = dataclasses.replace(LIVER, space=Space(spacing_mm=[1.0, 1.0, 2.0]))
    assert prepare_case(item, recipe, 2.0).spacing_mm == pytest.approx((0.5, 0.5, 1.0))
    assert prepare_case(item, LIVER, 0.5).spacing_mm == pytest.approx((2.0, 2.0, 4.0))


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_grids_are_monais(axes: str, tmp_path: Path) -> None:
    """Orientation and Spacing, which the published recipes use; labels apart from ties between two voxels."""
    from monai.data import MetaTensor
    from monai.transforms import Orientation, Spacing

    wanted = (0.9, 1.3, 0.7)
    image = nib.load(save(tmp_path / "i.nii.gz", scene()[0], axes, (0.8, 1.0, 2.5)))
    stored = np.asanyarray(image.dataobj).astype(np.float32)
    theirs = MetaTensor(torch.from_numpy(stored)[None], affine=torch.from_numpy(image.affine))
    theirs = Spacing(wanted, mode="bilinear", padding_mode="border")(
        Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(theirs)
    )
    grid = GridMap(image.shape, image.affine, "RAS", wanted)
    ours = grid.prepare(stored, linear=True)
    assert ours.shape == theirs.shape[1:]
    assert np.allclose(ours, theirs[0].numpy(), atol=1e-3) and np.allclose(grid.affine, theirs.affine.numpy(), atol=1e-5)


def test_a_window_maps_to_one_and_clips(tmp_path: Path) -> None:
    image = np.zeros(SHAPE, np.float32)
    image[0, 0, :5] = [-1000, -175, 37.5, 250, 3000]
    item = Item((save(tmp_path / "ct.nii.gz", image),), None, "ct")
    case = prepare_case(item, dataclasses.replace(LIVER, intensity=Intensity(window=[-175, 250])))
    assert case.image[0, 0, 0, :5].tolist() == pytest.approx([-1, -1, 0, 1, 1], abs=2e-5)
    assert case.label is None


@pytest.mark.parametrize("how", ["files", "one file"])
def test_channels_come_from_files_or_from_one_file_each_normalised(tmp_path: Path, how: str) -> None:
    one, label = scene()
    other = 1000 - 3 * scene(1)[0]
    if how == "files":
        images = save(tmp_path / "a_t1.nii.gz", one, "LPS"), save(tmp_path / "a_t2.nii.gz", other, "LPS")
    else:
        images = (save(tmp_path / "a.nii.gz", np.stack([one, other], -1), "LPS"),)
    case = prepare_case(Item(images, save(tmp_path / "seg.nii.gz", label, "LPS"), "a"), TWO)
    assert case.image.shape == (2, *SHAPE)
    for channel, source in zip(case.image, (one, other), strict=True):
        low, high = np.percentile(source, (0.05, 99.95))
        assert np.abs(channel.numpy() - np.clip((source - low) / (high - low) * 2 - 1, -1, 1)).max() < 2e-5
    restored = restore_prediction(case.label, case)
    assert restored.shape == nib.load(images[0]).shape[:3]


def test_stored_label_values_are_read_as_the_recipe_says(tmp_path: Path) -> None:
    image, label = scene()
    item = Item((save(tmp_path / "i.nii.gz", image),), save(tmp_path / "l.nii.gz", np.where(label == 2, 255, label)), "one")
    assert np.array_equal(prepare_case(item, LIVER).label[0].numpy(), label)


def test_a_classifications_image_is_resized(tmp_path: Path) -> None:
    recipe = Recipe(task="classification", bins={"young": [20, 30], "old": [30, 90]}, resize=[8, 9, 7], name="ages")
    case = prepare_case(Item((save(tmp_path / "i.nii.gz", scene()[0]),), 1, "one"), recipe)
    assert case.image.shape == (1, 8, 9, 7) and case.label is None


def test_a_case_stored_as_nrrd_is_prepared_and_overlays_its_file(tmp_path: Path) -> None:
    """LA-SEG and TDSC-ABUS; the label map is found against the same case as NIfTI."""
    sitk = pytest.importorskip("SimpleITK")
    item = saved_case(tmp_path, "PIR", (0.8, 1.0, 2.5))
    as_nrrd = []
    for path in (item.images[0], item.label):
        as_nrrd.append(path.replace(".nii.gz", ".nrrd"))
        sitk.WriteImage(sitk.ReadImage(path), as_nrrd[-1])
    case = prepare_case(Item((as_nrrd[0],), as_nrrd[1], "one"), LIVER)
    expected = prepare_case(item, LIVER)
    assert torch.equal(case.image, expected.image) and torch.equal(case.label, expected.label)
    back, truth = restore_prediction(case.label, case), nib.load(item.label)
    assert np.array_equal(np.asanyarray(back.dataobj), np.asanyarray(truth.dataobj))
    assert np.allclose(back.affine, truth.affine, atol=1e-5)


# ---------------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: save(f / "label.nii.gz", scene()[1][:-1]), ["label.nii.gz", "shapes", "(13, 12, 10)", "(14, 12, 10)"]),
        (lambda f: save(f / "label.nii.gz", scene()[1], "LAS"), ["label.nii.gz", "orientations are LAS and RAS"]),
        (lambda f: save(f / "label.nii.gz", scene()[1], spacing_mm=(1, 1, 1.5)), ["label.nii.gz", "mm apart"]),
        (lambda f: save(f / "label.nii.gz", scene()[1] * 3), ["label.nii.gz", "label values 3, 6", "0, 1, 2, 255", "recipe"]),
        (lambda f: save(f / "label.nii.gz", scene()[1] * np.float32(0.5)), ["label values 0.5 are not"]),
        (lambda f: save(f / "image.nii.gz", np.ones(SHAPE, np.float32)), ["image.nii.gz", "constant"]),
        (lambda f: save(f / "image.nii.gz", np.full(SHAPE, np.nan, np.float32)), ["image.nii.gz", "no finite voxel"]),
        (lambda f: save(f / "image.nii.gz", np.stack([scene()[0]] * 3, -1)), ["image.nii.gz", "3 channels", "has 1"]),
        (
            lambda f: (f / "image.nii.gz").write_bytes((f / "image.nii.gz").read_bytes()[:900]),
            ["image.nii.gz", "cannot be read"],
        ),
    ],
    ids=["shape", "orientation", "place", "values", "fractions", "constant", "nan", "channels", "truncated"],
)
def test_a_case_that_cannot_be_used_is_named_with_what_is_wrong(
    tmp_path: Path, change: Callable[[Path], object], words: list[str]
) -> None:
    item = saved_case(tmp_path)
    change(tmp_path)
    with pytest.raises(BadInput) as caught:
        prepare_case(item, LIVER)
    message = str(caught.value)
    assert "\n" not in message and not [w for w in words if w not in message], message


@pytest.mark.parametrize("shift_mm, fits", [(0.37, True), (0.43, False)])
def test_files_of_a_case_or_a_scan_may_lie_less_than_half_a_voxel_apart(tmp_path: Path, shift_mm: float, fits: bool) -> None:
    item = saved_case(tmp_path, spacing_mm=(1.0, 0.8, 2.5))
    stored = nib.load(item.label)
    affine = stored.affine.copy()
    affine[0, 3] += shift_mm
    nib.save(nib.Nifti1Image(np.asanyarray(stored.dataobj), affine), item.label)
    for check in (lambda: check_headers([item], LIVER), lambda: load_scan([item.images[0], item.label])):
        with nullcontext() if fits else pytest.raises(BadInput, match=r"voxels lie up to 0.43 mm apart"):
            check()


def test_an_oblique_case_is_not_refused_for_the_name_of_its_axes(tmp_path: Path) -> None:
    """At 45 degrees a rounding decides which axis is called which."""
    item = saved_case(tmp_path)
    for path, degrees in ((item.images[0], 44.99), (item.label, 45.01)):
        a = np.deg2rad(degrees)
        turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        nib.save(nib.Nifti1Image(np.asanyarray(nib.load(path).dataobj), nib.affines.from_matvec(turn)), path)
    assert len({nib.aff2axcodes(nib.load(path).affine) for path in (item.images[0], item.label)}) == 2
    check_headers([item], LIVER)


def test_zero_spacing_is_refused_by_headers_alone(tmp_path: Path) -> None:
    item = saved_case(tmp_path)
    plain = tmp_path / "image.nii"
    nib.save(nib.load(item.images[0]), plain)
    data = bytearray(plain.read_bytes())
    data[80:84] = b"\0\0\0\0"  # pixdim[1]
    data[254:256] = b"\0\0"  # sform_code, so that the qform counts
    plain.write_bytes(data)
    with pytest.raises(BadInput, match=r"image\.nii: its qform: spacing .*0\.0.* is not positive"):
        check_headers([item, dataclasses.replace(item, images=(str(plain),))], LIVER)


# ---------------------------------------------------------------------- the list


def dataset(folder: Path, recipe: Recipe = LIVER) -> dict[str, Any]:
    """Four cases of tiny files, listed."""
    splits: dict[str, Any] = {"training": [], "validation": [], "test": []}
    for i, split in enumerate(("training", "training", "validation", "test")):
        image, label = scene(i)
        item = {
            f"image{c + 1}" if recipe.channels > 1 else "image": save(folder / f"case{i}" / f"mr_{c}.nii.gz", image)
            for c in range(recipe.channels)
        }
        splits[split].append({**item, "label": save(folder / f"case{i}" / "seg.nii.gz", label), "patient": f"p{i}"})
    write_downstream_datalist(folder / f"{recipe.name}_100_datalist.json", splits, seed=0)
    return json.loads((folder / f"{recipe.name}_100_datalist.json").read_text())


def test_a_written_list_is_read_again_with_relative_paths_and_readable_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = dataset(tmp_path / "data", TWO)
    assert content["shuffle_seed"] == 0 and not any(os.path.isabs(i["image1"]) for i in content["training"])
    (tmp_path / "data").rename(tmp_path / "moved")
    items = read_downstream_datalist(tmp_path / "moved", TWO)
    assert {split: len(items[split]) for split in SPLITS} == {"training": 2, "validation": 1, "test": 1}
    assert sorted(i.case for part in items.values() for i in part) == [f"case{i}_mr" for i in range(4)]
    assert [len(i.images) for i in items["training"]] == [2, 2] and not caplog.records
    check_headers(items["test"], TWO)


def test_a_written_training_list_is_shuffled_by_the_seed_it_records(tmp_path: Path) -> None:
    rows = {"training": [{"case": f"{i:02}"} for i in range(20)], "validation": [], "test": [{"case": "b"}, {"case": "a"}]}
    orders = {}
    for seed in (1, 2):
        write_downstream_datalist(tmp_path / "l.json", rows, seed)
        content = json.loads((tmp_path / "l.json").read_text())
        assert content["shuffle_seed"] == seed and [r["case"] for r in content["test"]] == ["b", "a"]
        orders[seed] = [r["case"] for r in content["training"]]
    assert sorted(orders[1]) == sorted(orders[2]) == [r["case"] for r in rows["training"]]
    assert orders[1] != orders[2] and sorted(orders[1]) not in orders.values()
    assert [p.name for p in tmp_path.iterdir()] == ["l.json"]


def test_a_list_that_is_not_said_to_be_shuffled_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = dataset(tmp_path)
    del content["shuffle_seed"]
    (tmp_path / "liver_100_datalist.json").write_text(json.dumps(content))
    read_downstream_datalist(tmp_path, LIVER)
    assert "shuffle_seed" in caplog.text and "liver_100_datalist.json" in caplog.text


def broken(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the content of the list."""

    def write(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: p.unlink(), ["No such file", "--base-data-dir"]),
        (lambda p: p.write_text(p.read_text()[:200]), ["not valid JSON", "half-written"]),
        (lambda p: p.write_text("[]"), ["holds a list"]),
        (broken(lambda c: c.pop("test")), ["no list 'test'"]),
        (broken(lambda c: c.update(validation=[], test=[], training=c["training"][:1])), ["0 validation", "one case only"]),
        (broken(lambda c: c["training"].append("case7")), ["training 2", "expected an object"]),
        (broken(lambda c: c["training"][1].pop("image2")), ["training 1", "image2 is missing", "2 channels"]),
        (broken(lambda c: c["training"][1].update(image3="x")), ["training 1", "image3 is one too many"]),
        (broken(lambda c: c["test"][0].update(label="case9/seg.nii.gz")), ["test 0", "no such file", "case9/seg.nii.gz"]),
        (broken(lambda c: c["test"][0].pop("label")), ["test 0", "label must be the path"]),
        (broken(lambda c: c["test"].append(c["training"][0])), ["is in training and again in test"]),
        (broken(lambda c: c["test"][0].update(patient="p0")), ["patient p0 is in training and test"]),
        (broken(lambda c: [i.update(case="x") for i in c["training"]]), ["case x is in training and again"]),
    ],
    ids=[
        "no list", "half-written", "list", "no part", "one case", "no object", "missing channel", "extra channel",
        "missing file", "no label", "leak", "patient", "name",
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_used_is_named_with_the_item(
    tmp_path: Path, change: Callable[[Path], object], words: list[str]
) -> None:
    dataset(tmp_path, TWO)
    path = tmp_path / "two_100_datalist.json"
    change(path)
    with pytest.raises(BadInput) as caught:
        read_downstream_datalist(tmp_path, TWO)
    message = str(caught.value)
    assert "\n" not in message and not [w for w in [*words, str(path)] if w not in message], message


def test_a_list_of_the_other_kind_beside_a_missing_one_is_named(tmp_path: Path) -> None:
    for there, task in (("_100_", "segmentation"), ("_cls_", "classification")):
        folder = tmp_path / task
        folder.mkdir()
        (folder / f"ages{there}datalist.json").write_text("{}")
        recipe = Recipe(task="classification", bins={"all": [0, 99]}, name="ages")
        if task == "classification":
            recipe = Recipe(classes={0: "background", 1: "liver"}, name="ages")
        with pytest.raises(BadInput, match=f"beside it is ages{there}datalist.json, the name of a {task}'s list"):
            read_downstream_datalist(folder, recipe)


def test_a_brats_file_of_another_year_is_told_by_its_labels(tmp_path: Path) -> None:
    voxels, label = scene()
    label = (label == 2) * 3 + (label == 1)  # 3: the enhancing tumour of 2023
    paths = save(tmp_path / "t1.nii.gz", voxels), save(tmp_path / "seg.nii.gz", label.astype(np.uint8))
    recipe = dataclasses.replace(load_recipe("BraTS"), channels=1)
    with pytest.raises(
        BadInput, match="a recipe of two lines, `base: eval/datasets/BraTS` and `regions: brats2023` .or brats2013"
    ):
        prepare_case(Item((str(paths[0]),), str(paths[1]), "case"), recipe)
    (tmp_path / "mine.yaml").write_text("base: eval/datasets/BraTS\nregions: brats2023\nchannels: 1\n")
    prepare_case(Item((str(paths[0]),), str(paths[1]), "case"), load_recipe(tmp_path / "mine.yaml"))


def test_class_values_and_bins_become_class_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content: dict[str, Any] = {"shuffle_seed": 1}
    for i, (split, age) in enumerate(zip(SPLITS, (20, 29.5, 30), strict=True)):
        content[split] = [{"image": save(tmp_path / f"{i}.nii.gz", scene()[0]), "label": age}]
    (tmp_path / "ages_cls_datalist.json").write_text(json.dumps(content))
    ages = Recipe(task="classification", bins={"20-29": [20, 30], "30-39": [30, 40]}, name="ages")
    assert [read_downstream_datalist(tmp_path, ages)[s][0].label for s in SPLITS] == [0, 0, 1]
    with pytest.raises(BadInput, match="label 30 is in none of"):
        read_downstream_datalist(tmp_path, dataclasses.replace(ages, bins={"20-29": [20, 30]}))
    outside = dataclasses.replace(ages, bins={"20-29": [20, 30]}, outside_bins="leave_out")
    with pytest.raises(BadInput, match="no case of its test part"):
        read_downstream_datalist(tmp_path, outside)
    content["test"].append({"image": save(tmp_path / "young.nii.gz", scene()[0]), "label": 21})
    (tmp_path / "ages_cls_datalist.json").write_text(json.dumps(content))
    assert [len(read_downstream_datalist(tmp_path, outside)[s]) for s in SPLITS] == [1, 1, 1]
    assert "left out 0 of 1 training, 0 of 1 validation, 1 of 2 test cases" in caplog.text
    assert repr(outside) == repr(dataclasses.replace(outside, outside_bins="refuse")), "runs begun without the key go on"
    assert load_recipe("ICBM").outside_bins == "leave_out"
    content["test"].pop()
    named = Recipe(task="classification", bins=None, classes={0: "healthy", 1: "ill"}, name="ages")
    for split, value in zip(SPLITS, ("ill", 0, "healthy"), strict=True):
        content[split][0]["label"] = value
    (tmp_path / "ages_cls_datalist.json").write_text(json.dumps(content))
    assert [read_downstream_datalist(tmp_path, named)[s][0].label for s in SPLITS] == [1, 0, 0]


def test_a_fraction_is_the_first_items_or_those_of_a_seeded_shuffle() -> None:
    items = [Item((f"{i}",), None, f"{i}") for i in range(20)]
    assert select_percent(items, 25) == items[:5] and select_percent(items, 100) == items
    assert len(select_percent(items[:13], 10)) == 1  # round(1.3)
    shuffled = select_percent(items, 25, shuffle_seed=3)
    assert shuffled != items[:5] and shuffled == select_percent(items, 25, shuffle_seed=3)
    assert set(i.case for i in shuffled) < set(i.case for i in select_percent(items, 50, shuffle_seed=3))
    assert [i.case for i in items] == [str(i) for i in range(20)]
    for percent, words in ((0, "above 0"), (101, "at most 100"), (1, "use 5 or more")):
        with pytest.raises(BadInput, match=words):
            select_percent(items, percent)


# ---------------------------------------------------------------------- the cache


def equal(a: Case, b: Case) -> bool:
    same_label = (a.label is None and b.label is None) or torch.equal(a.label, b.label)
    same_grid = np.array_equal(a.affine, b.affine) and a.grid.shape == b.grid.shape and a.spacing_mm == b.spacing_mm
    return torch.equal(a.image, b.image) and same_label and same_grid and a.name == b.name


@pytest.mark.parametrize("labelled", [True, False])
def test_a_cached_case_is_the_prepared_one_and_the_files_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labelled: bool
) -> None:
    item = saved_case(tmp_path / "data", "PIR", (1, 1, 2))
    item = dataclasses.replace(item, images=item.images * 2, label=item.label if labelled else None)
    recipe = dataclasses.replace(TWO, space=Space(spacing_mm=[1.5, 1.0, 1.0]))
    fresh = Cases([item], recipe, 1.0, tmp_path / "cache")[0]
    monkeypatch.setattr("dinov2.data.downstream.cases.open_volume", lambda entry: pytest.fail(f"opened {entry.image}"))
    cached = Cases([item], recipe, 1.0, tmp_path / "cache")[0]
    assert equal(fresh, cached) and len(list((tmp_path / "cache").glob("??/*.vol"))) == 1
    restored = (np.asanyarray(restore_prediction((c.image > 0)[:1].int(), c).dataobj) for c in (fresh, cached))
    assert np.array_equal(*restored)


CHANGES = {
    "label map": lambda r: dataclasses.replace(r, label_map={255: 1}),
    "classes": lambda r: dataclasses.replace(r, classes={0: "b", 1: "l", 2: "x", 3: "y"}),
    "spacing": lambda r: dataclasses.replace(r, space=Space(spacing_mm=[1, 1, 1.5])),
    "orientation": lambda r: dataclasses.replace(r, space=Space(orientation="LPS")),
    "window": lambda r: dataclasses.replace(r, intensity=Intensity(window=[0, 100])),
    "percentiles": lambda r: dataclasses.replace(r, intensity=Intensity(percentiles=[1, 99])),
}


@pytest.mark.parametrize("what", [*CHANGES, "scale", "image", "label", "name"])
def test_the_cache_is_never_stale(tmp_path: Path, what: str) -> None:
    """A changed recipe, scale or source file gives what a run without a cache gives."""
    item, recipe, scale = saved_case(tmp_path / "data"), LIVER, 1.0
    Cases([item], recipe, scale, tmp_path / "cache")[0]
    image, label = scene(5)
    if what in CHANGES:
        recipe = CHANGES[what](recipe)
    elif what == "scale":
        scale = 1.5
    elif what == "image":
        save(tmp_path / "data" / "image.nii.gz", image)
    elif what == "label":
        save(tmp_path / "data" / "label.nii.gz", np.roll(label, 1, 0))
    else:
        item = dataclasses.replace(item, case="another")
    now = Cases([item], recipe, scale, tmp_path / "cache")[0]
    assert equal(now, prepare_case(item, recipe, scale))
    assert len(list((tmp_path / "cache").glob("??/*.vol"))) == 2


def test_a_damaged_cached_case_is_named_and_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    item = saved_case(tmp_path / "data")
    fresh = Cases([item], LIVER, 1.0, tmp_path / "cache")[0]
    path = next((tmp_path / "cache").glob("??/*.vol"))
    path.write_bytes(path.read_bytes()[:-40])
    assert equal(Cases([item], LIVER, 1.0, tmp_path / "cache")[0], fresh)
    assert "made anew" in caplog.text and "one" in caplog.text


# ---------------------------------------------------------------------- real volumes


@pytest.mark.data
def test_a_real_brats_case_of_2013_is_prepared_and_overlays_its_file_exactly(local_data: Path, tmp_path: Path) -> None:
    """Two of the four contrasts repeated, in this test only; stored L P S."""
    (tmp_path / "B.yaml").write_text("base: eval/datasets/BraTS\nregions: brats2013\n")
    folder = sorted((local_data / "brats_format").glob("*/"))[0]
    images = [str(next(folder.glob(f"{name}*.nii.gz"))) for name in ("Flair", "T1c", "T1c", "Flair")]
    item = Item(tuple(images), str(next(folder.glob("OTMultiClass*"))), folder.name)
    recipe = load_recipe(tmp_path / "B.yaml")
    case = prepare_case(item, recipe)
    assert case.image.shape == (4, 240, 240, 155)
    sizes = dict(zip(recipe.output_names, recipe.masks(case.label).flatten(1).sum(1).tolist(), strict=True))
    assert 0 < sizes["ET"] < sizes["TC"] < sizes["WT"]
    back, truth = restore_prediction(case.label, case), nib.load(item.label)
    assert np.array_equal(np.asanyarray(back.dataobj), np.asanyarray(truth.dataobj))
    assert np.array_equal(back.affine, nib.load(images[0]).affine)
