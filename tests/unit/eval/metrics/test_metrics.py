"""Segmentation metrics against hand-computed shapes, brute force and MONAI; the rule for absent classes."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2.eval.metrics.segmentation import COLUMNS, Score, score_case, summarise, write_per_case_csv

SPACING = (0.7, 1.0, 2.5)


def box(start: tuple[int, int, int], size: tuple[int, int, int], shape: tuple[int, int, int] = (24, 20, 16)) -> Tensor:
    mask = torch.zeros(1, *shape, dtype=torch.bool)
    mask[(0, *(slice(a, a + n) for a, n in zip(start, size, strict=True)))] = True
    return mask


def blobs(seed: int, shape: tuple[int, int, int] = (7, 6, 5)) -> Tensor:
    return torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed)) < (0.15 + 0.1 * (seed % 4))


def score(one: Tensor, other: Tensor, tolerance_mm: float = 1.0, **kwargs: bool) -> Score:
    return score_case("a", one, other, SPACING, ["organ"], tolerance_mm, **kwargs)[0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shifted_box_is_off_by_the_shift_in_mm(axis: int) -> None:
    """Two voxels along each axis in turn: the end faces, more than 5 % of the surface, are that far away."""
    shift = [0, 0, 0]
    shift[axis] = 2
    moved = score(box((4 + shift[0], 4 + shift[1], 4 + shift[2]), (8, 8, 8)), box((4, 4, 4), (8, 8, 8)))
    assert moved.dice == pytest.approx(6 / 8)
    assert moved.hd95_mm == pytest.approx(2 * SPACING[axis])
    assert moved.volume_error_ml == 0


def test_volume_error_is_predicted_minus_true_in_ml() -> None:
    found = score(box((4, 4, 4), (8, 8, 4)), box((4, 4, 4), (8, 8, 8)))
    assert found.volume_error_ml == pytest.approx(-8 * 8 * 4 * 0.7 * 1.0 * 2.5 / 1000)


def test_the_surface_dice_counts_what_lies_within_the_tolerance() -> None:
    """Plates one voxel thick, two slices (5 mm) apart: all of the surface is beyond 4.9 mm and within 5.1 mm."""
    plates = box((2, 2, 4), (10, 10, 1)), box((2, 2, 6), (10, 10, 1))
    assert [score(*plates, tolerance_mm=t).nsd for t in (4.9, 5.1)] == [0, 1]
    half = plates[0] | plates[1]  # the one plate is found, the other is not there: 200 of 300 voxels
    assert score(half, plates[0]).nsd == pytest.approx(200 / 300)


def brute_force(one: Tensor, other: Tensor, tolerance_mm: float) -> tuple[float, float]:
    """Surface voxels by their neighbours, all pairs of distances."""

    def surface(mask: Tensor) -> np.ndarray:
        filled = {tuple(v) for v in mask[0].nonzero().tolist()}
        steps = [s for s in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, s)) == 1]
        edge = [v for v in filled if any(tuple(np.add(v, s)) not in filled for s in steps)]
        return np.array(edge) * np.array(SPACING)

    a, b = surface(one), surface(other)
    pairs = np.linalg.norm(a[:, None] - b[None], axis=-1)
    there, back = pairs.min(1), pairs.min(0)
    near = (there <= tolerance_mm).sum() + (back <= tolerance_mm).sum()
    return max(np.percentile(there, 95), np.percentile(back, 95)), near / (len(a) + len(b))


@pytest.mark.parametrize("seed", range(8))
def test_surface_measures_equal_all_pairs_of_surface_voxels(seed: int) -> None:
    one, other = blobs(seed), blobs(seed + 100)
    found = score(one, other, tolerance_mm=1.5)
    assert (found.hd95_mm, found.nsd) == pytest.approx(brute_force(one, other, 1.5))


@pytest.mark.parametrize("seed", range(3))
def test_surface_measures_equal_monai(seed: int) -> None:
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    one, other = box((3, 5, 2), (9, 8, 6)) & ~box((5, 6, 4), (3, 3, 3 - seed)), box((5 - seed, 4, 4), (10, 8, 7))
    found = score(one, other, tolerance_mm=1.5)
    pair = one[None].float(), other[None].float()
    hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=SPACING)
    nsd = compute_surface_dice(*pair, class_thresholds=[1.5], include_background=True, spacing=SPACING)
    assert (found.dice, found.hd95_mm, found.nsd) == pytest.approx(
        (float(compute_dice(*pair)), float(hd95), float(nsd)), rel=1e-5
    )


def test_absent_classes_follow_the_stated_rule() -> None:
    empty, full = torch.zeros(1, 24, 20, 16, dtype=torch.bool), box((4, 4, 4), (8, 8, 8))
    both = score(empty, empty)
    assert all(math.isnan(v) for v in (both.dice, both.hd95_mm, both.nsd, both.volume_error_ml))
    for pair in ((empty, full), (full, empty)):
        one = score(*pair)
        assert (one.dice, one.nsd) == (0, 0)
        assert one.hd95_mm == pytest.approx(math.sqrt((24 * 0.7) ** 2 + 20**2 + (16 * 2.5) ** 2))


def made(case: str, name: str, dice: float, in_prediction: bool = True, in_target: bool = True) -> Score:
    return Score(case, name, dice, 1.0, dice, 1.0, 0.0, in_prediction, in_target)


def test_means_are_of_cases_with_and_without_background_and_absences_are_counted() -> None:
    names = ["background", "a", "b"]
    scores = [
        made("1", "background", 1.0), made("1", "a", 0.8), made("1", "b", math.nan, False, False),
        made("2", "background", 1.0), made("2", "a", 0.4), made("2", "b", 0.0, True, False),
    ]  # fmt: skip
    summary = summarise(scores, names, background=True)
    assert summary["mean"]["dice"] == pytest.approx((0.8 + 0.2) / 2)
    assert summary["mean_with_background"]["dice"] == pytest.approx((0.9 + 1.4 / 3) / 2)
    assert summary["per_class"]["b"]["dice"] == 0 and summary["num_cases"] == 2
    assert (summary["absent_in_both"], summary["absent_in_one"]) == ({"b": 1}, {"b": 1})
    regions = summarise(scores, names, background=False)
    assert regions["mean"]["dice"] == summary["mean_with_background"]["dice"] and "mean_with_background" not in regions


def test_the_table_has_a_row_per_case_and_class_and_leaves_empty_what_is_not_counted(tmp_path: Path) -> None:
    write_per_case_csv(tmp_path / "per_case.csv", [made("1", "a, left", 0.8), made("1", "b", math.nan, False, False)])
    rows = list(csv.DictReader((tmp_path / "per_case.csv").open()))
    assert tuple(rows[0]) == COLUMNS
    assert rows[0]["class"] == "a, left" and rows[0]["dice"] == "0.8" and rows[1]["dice"] == ""
    assert [p.name for p in tmp_path.iterdir()] == ["per_case.csv"]


def test_masks_of_another_shape_are_refused_and_surfaces_can_be_left_out() -> None:
    with pytest.raises(ValueError, match="same"):
        score(box((0, 0, 0), (2, 2, 2)), torch.zeros(1, 3, 3, 3, dtype=torch.bool))
    quick = score(box((0, 0, 0), (2, 2, 2)), box((0, 0, 0), (2, 2, 4)), surfaces=False)
    assert quick.dice == pytest.approx(2 / 3) and math.isnan(quick.hd95_mm)
