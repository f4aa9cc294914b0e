"""Dataset recipes: strict, explained, and what label values mean."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dinov2.configs import ConfigError
from dinov2.data.downstream.recipes import LABEL_SCHEMES, Recipe, load_recipe
from tests.conftest import ROOT

DATASETS = sorted(p.stem for p in (ROOT / "configs" / "eval" / "datasets").glob("*.yaml"))
SEGMENTATIONS = [name for name in DATASETS if load_recipe(name).task == "segmentation"]
CLASSES = "classes: {0: background, 1: liver}\n"


def written(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", DATASETS)
def test_every_shipped_recipe_loads_by_name_and_opens_with_what_it_follows(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    head = (ROOT / "configs" / "eval" / "datasets" / f"{name}.yaml").read_text().split("\ntask:")[0]
    assert "3DINO paper, Methods" in head and f"--dataset-name {name}" in head


def test_the_papers_outputs() -> None:
    outputs = {name: (r.num_outputs, r.overlapping, r.channels) for name in SEGMENTATIONS if (r := load_recipe(name))}
    assert outputs == {
        "BTCV": (14, False, 1), "BraTS": (3, True, 4), "LA-SEG": (2, False, 1), "TDSC-ABUS": (2, False, 1),
        "MSD-Hippocampus": (3, False, 1), "MSD-Hippocampus-single": (3, False, 1),
    }  # fmt: skip
    assert load_recipe("LA-SEG").label_map == {255: 1}


def test_a_file_comes_before_a_name_and_a_recipe_can_begin_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, CLASSES, "BTCV")
    assert load_recipe("BTCV.yaml").num_outputs == 2 and load_recipe("BTCV").num_outputs == 14
    later = load_recipe(written(tmp_path, "base: eval/datasets/BraTS\nregions: brats2023\n", "BraTS2023"))
    assert (later.name, later.channels, later.values) == ("BraTS2023", 4, (0, 1, 2, 3))


@pytest.mark.parametrize(
    "text, words",
    [
        ("clases: {0: a, 1: b}", ["unknown key 'clases'", "did you mean 'classes'"]),
        (CLASSES + "space: {spacng_mm: [1, 1, 1]}", ["space.spacng_mm", "did you mean 'space.spacing_mm'"]),
        (CLASSES + "train: {crops_per_volume: four}", ["train.crops_per_volume", "four"]),
        (CLASSES + "train: {crop: posneg}", ["train.crop='posneg'", "did you mean 'pos_neg'"]),
        (CLASSES + "train: {flip_p: 1.5}", ["train.flip_p=1.5", "0 to 1"]),
        (CLASSES + "space: {orientation: RAR}", ["space.orientation='RAR'", "RAS"]),
        (CLASSES + "space: {spacing_mm: [1, 0, 1]}", ["space.spacing_mm", "positive"]),
        (CLASSES + "intensity: {window: [250, -175]}", ["intensity.window", "low < high"]),
        (CLASSES + "intensity: {window: [0, 1], percentiles: [0, 100]}", ["keep one"]),
        (CLASSES + "label_map: {255: 7}", ["label_map", "[7]"]),
        (CLASSES + "regions: brats2021", ["exactly one of classes and regions", "got classes and regions"]),
        ("channels: 1", ["exactly one of classes and regions", "got none"]),
        ("classes: {0: background, 2: liver}", ["0, 1, 2", "label_map"]),
        ("classes: {a: background}", ["classes.a", "incompatible"]),
        ("regions: brats2020", ["regions='brats2020'", "brats2021", "did you mean"]),
        ("regions: {TC: [1, x]}", ["regions.TC", "label values"]),
        ("task: segmentaton", ["task='segmentaton'", "did you mean 'segmentation'"]),
        ("task: classification\nbins: {young: [30, 20]}", ["bins.young", "from < to"]),
        (CLASSES + "resize: [96, 96, 96]", ["resize is for classification"]),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and not [w for w in words if w not in message], message


def test_an_unknown_dataset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'LA-SEG'"):
        load_recipe("LASEG")


def test_classification_recipes_are_admitted(tmp_path: Path) -> None:
    ages = "task: classification\nbins: {'20-29': [20, 30], '30-39': [30, 40]}\nresize: [96, 96, 96]\n"
    recipe = load_recipe(written(tmp_path, ages))
    assert recipe.output_names == ["20-29", "30-39"] and recipe.resize == [96, 96, 96]
    lungs = "task: classification\nclasses: {0: Normal, 1: COVID-19, 2: Cap}\n"
    assert load_recipe(written(tmp_path, lungs)).output_names == ["Normal", "COVID-19", "Cap"]


@pytest.mark.parametrize(
    "scheme, members",
    [  # of each label value in order, the regions TC, WT, ET that it is part of
        ("brats2013", ["", "TC WT", "WT", "TC WT", "TC WT ET"]),
        ("brats2021", ["", "TC WT", "WT", None, "TC WT ET"]),
        ("brats2023", ["", "TC WT", "WT", "TC WT ET"]),
        ("decathlon", ["", "WT", "TC WT", "TC WT ET"]),
    ],
)
def test_what_each_years_label_values_mean(tmp_path: Path, scheme: str, members: list[str | None]) -> None:
    recipe = load_recipe(written(tmp_path, f"regions: {scheme}"))
    assert recipe.output_names == ["TC", "WT", "ET"]
    assert recipe.values == tuple(v for v, m in enumerate(members) if m is not None)
    for value, names in enumerate(members):
        if names is not None:
            masks = recipe.masks(torch.full((1, 1, 1, 1), value)).flatten().tolist()
            assert [n for n, m in zip(recipe.output_names, masks, strict=True) if m] == names.split(), value


def with_values(recipe: Recipe) -> torch.Tensor:
    values = torch.tensor(recipe.values, dtype=torch.int16)
    return values[torch.randint(len(values), (1, 5, 4, 3), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_masks_of_a_label_map_compose_to_it_again(name: str) -> None:
    recipe = load_recipe(name)
    label = with_values(recipe)
    masks = recipe.masks(label)
    assert masks.shape == (recipe.num_outputs, 5, 4, 3) and torch.equal(recipe.compose(masks), label)
    assert recipe.overlapping or bool((masks.sum(0) == 1).all())


def test_masks_that_no_label_value_has_get_the_closest_value(tmp_path: Path) -> None:
    """Regions predicted each on its own need not be nested."""
    recipe = load_recipe(written(tmp_path, "regions: brats2021"))

    def value(*masks: bool) -> int:
        return int(recipe.compose(torch.tensor(masks).reshape(3, 1, 1, 1)))

    assert value(True, False, True) == 4 and value(False, True, True) == 4
    assert value(True, False, False) == 1 and value(False, False, False) == 0


def test_schemes_are_not_changed_by_those_who_use_them() -> None:
    load_recipe("BraTS").regions["TC"].append(9)
    assert LABEL_SCHEMES["brats2021"]["TC"] == [1, 4]


def test_every_key_of_a_recipe_is_read_by_code() -> None:
    """Those of training are read by the crops and by the engine's loss."""
    code = "\n".join(p.read_text() for p in (ROOT / "dinov2").rglob("*.py"))
    keys = re.findall(r"^    (\w+): .*= (?:key|section)\(", (ROOT / "dinov2/data/downstream/recipes.py").read_text(), re.M)
    elsewhere = {"loss", "dice_squared", "metrics"}
    assert len(keys) > 20
    assert not [k for k in keys if k not in elsewhere and not re.search(rf"(recipe|self|train|plan)\S*\.{k}\b", code)]
