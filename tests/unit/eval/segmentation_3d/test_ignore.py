"""Voxels that a recipe ignores: no loss, no metric and no crop's centre sees them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dinov2.configs import ConfigError
from dinov2.data.downstream.cases import Cases, prepare_case
from dinov2.data.downstream.crops import _random_centre
from dinov2.data.downstream.lists import Item
from dinov2.data.downstream.recipes import IGNORED, Recipe, Training, load_recipe
from dinov2.eval.segmentation_3d import inference
from dinov2.eval.segmentation_3d.inference import score_cases
from dinov2.eval.segmentation_3d.losses import build_loss

CLASSES = Recipe(classes={0: "background", 1: "one", 2: "two"}, ignore=[255])
REGIONS = Recipe(regions={"whole": [1, 2], "core": [2]}, ignore=[255], train=Training(loss="dice"))
SINGLE = Recipe(regions={"whole": [1, 2]}, ignore=[255])


def batch(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, recipe.num_outputs, 6, 6, 6, generator=generator, dtype=torch.float64).requires_grad_()
    return logits, torch.randint(0, 3, (2, 1, 6, 6, 6), generator=generator)


@pytest.mark.parametrize("recipe", [CLASSES, REGIONS, SINGLE], ids=["classes", "regions", "one region"])
@pytest.mark.parametrize("squared", [False, True])
def test_the_loss_is_monais_on_what_is_not_ignored(recipe: Recipe, squared: bool) -> None:
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, dice_squared=squared))
    plain = build_loss(dataclasses.replace(recipe, ignore=[]))
    logits, labels = batch(recipe)
    assert build_loss(recipe)(logits, labels).item() == pytest.approx(plain(logits, labels).item(), abs=1e-6)
    labels[..., 4:] = IGNORED
    seen = plain(logits[..., :4], labels[..., :4]).item()
    loss = build_loss(recipe)(logits, labels)
    assert loss.item() == pytest.approx(seen, abs=1e-6)
    loss.backward()
    assert float(logits.grad[..., 4:].abs().max()) == 0 < float(logits.grad[..., :4].abs().max())
    labels[:] = IGNORED
    assert bool(build_loss(recipe)(logits, labels).isfinite())


def saved(folder: Path) -> Item:
    rng = np.random.default_rng(0)
    label = np.zeros((12, 12, 12), np.uint8)
    label[2:6, 2:6, 2:6], label[6:, 6:, 6:] = 1, 255
    nib.save(nib.Nifti1Image(rng.normal(100, 9, label.shape).astype(np.float32), np.eye(4)), folder / "i.nii.gz")
    nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "l.nii.gz")
    return Item((str(folder / "i.nii.gz"),), str(folder / "l.nii.gz"), "case")


def test_a_prepared_case_marks_them_and_scores_leave_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = saved(tmp_path)
    case = prepare_case(item, CLASSES)
    assert sorted(case.truth.unique().tolist()) == [IGNORED, 0, 1] and int((case.truth == IGNORED).sum()) == 216
    cached = Cases([item], CLASSES, 1.0, tmp_path / "cache")
    assert all(torch.equal(cached[0].truth, case.truth) for _ in range(2))
    other = Cases([item], dataclasses.replace(CLASSES, ignore=[], label_map={255: 2}), 1.0, tmp_path / "cache")
    assert 2 in other[0].truth, "another preparation, not what was cached"

    everything_ignored_is_two = CLASSES.masks(torch.where(case.truth == IGNORED, 2, case.truth))
    monkeypatch.setattr(inference, "predict_masks", lambda *_: everything_ignored_is_two)
    model = torch.nn.Identity()
    scores, _ = score_cases(model, cached, 8, 0.0, 1, torch.float32, SimpleRuntime(), surfaces=True)
    assert [s.dice for s in scores[:2]] == [1.0, 1.0] and not scores[2].in_prediction


class SimpleRuntime:
    rank, world_size = 0, 1


def test_no_crop_is_centred_on_them(tmp_path: Path) -> None:
    case = prepare_case(saved(tmp_path), CLASSES)
    rng = np.random.default_rng(1)
    centres = {_random_centre(case.image, case.truth, rng) for _ in range(300)}
    assert {int(case.truth[0][centre]) for centre in centres} == {0, 1}


def test_a_recipe_with_ignore_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both have .1."):
        Recipe(classes={0: "background", 1: "one"}, ignore=[1])
    with pytest.raises(ConfigError, match="is for a segmentation"):
        Recipe(task="classification", classes={0: "a", 1: "b"}, ignore=[255])
    (tmp_path / "mine.yaml").write_text("classes: {0: background, 1: organ}\nignore: [255]\n")
    assert load_recipe(tmp_path / "mine.yaml").ignore == [255]


@pytest.mark.parametrize("text", ["classes: {0: no, 1: yes}", "regions: {yes: [1]}", "classes: {0: a, 1: b}\nname: off"])
def test_words_that_yaml_takes_for_truth_values_are_to_be_quoted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="mine.yaml: (classes|regions|name): .*quote them"):
        load_recipe(path)
    path.write_text("classes: {0: 'no', 1: 'yes'}")
    assert load_recipe(path).output_names == ["no", "yes"]
