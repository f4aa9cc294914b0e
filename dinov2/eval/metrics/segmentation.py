"""Segmentation metrics of a case and class, their means, and the table of all of them.

A class that neither prediction nor target has is not counted (NaN). One that only one of them has scores Dice 0, surface Dice 0
and as HD95 the diagonal of the image; how often each happened is part of the summary.

R outputs: classes with the background first, or regions.

Source: 3DINO paper, Fig. 2 and 6 (Dice, HD95); surfaces and percentile as in MONAI, to which tests hold them.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt
from torch import Tensor

from dinov2.files import write_text

NAN = math.nan
COLUMNS = ("case", "class", "dice", "hd95_mm", "nsd", "nsd_tolerance_mm", "volume_error_ml")
MEASURES = ("dice", "hd95_mm", "nsd", "volume_error_ml")
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Score:
    """One class of one case; NaN: not counted, or not measured.

    Attributes:
        case: Name of the case.
        name: Of the class or region.
        dice: Overlap, 0 to 1.
        hd95_mm: The larger of both directions' 95th percentile of surface distances.
        nsd: Share of both surfaces within the tolerance of the other, 0 to 1.
        nsd_tolerance_mm: That tolerance.
        volume_error_ml: Predicted minus true volume.
        in_prediction: Whether the prediction has it.
        in_target: Whether the target has it.
    """

    case: str
    name: str
    dice: float
    hd95_mm: float
    nsd: float
    nsd_tolerance_mm: float
    volume_error_ml: float
    in_prediction: bool
    in_target: bool


def score_case(
    case: str,
    prediction: Tensor,
    target: Tensor,
    spacing_mm: Spacing,
    names: Sequence[str],
    tolerance_mm: float,
    surfaces: bool = True,
) -> list[Score]:
    """Every class of one case.

    Args:
        case: Its name.
        prediction: [R, H, W, D] bool (`Recipe.masks`).
        target: The same, the truth.
        spacing_mm: Of a voxel along H, W, D.
        names: Of the R outputs.
        tolerance_mm: Of the surface Dice (`metrics.nsd_tolerance_mm`).
        surfaces: Also the two surface measures, which take longer; NaN without.

    Raises:
        ValueError: Shapes that differ.
    """
    if prediction.shape != target.shape or len(prediction) != len(names):
        found = f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)}, {len(names)} names"
        raise ValueError(f"{case}: {found}: expected the same [R, H, W, D] and R names")
    scores = []
    for name, one, other in zip(names, prediction.cpu().numpy(), target.cpu().numpy(), strict=True):
        num_one, num_other = int(np.count_nonzero(one)), int(np.count_nonzero(other))
        dice = hd95 = nsd = error = NAN
        if num_one or num_other:
            dice = 2 * int(np.count_nonzero(one & other)) / (num_one + num_other)
            error = (num_one - num_other) * math.prod(spacing_mm) / 1000
            if surfaces:
                hd95, nsd = _surface_measures(one, other, spacing_mm, tolerance_mm)
        scores.append(Score(case, name, dice, hd95, nsd, tolerance_mm, error, num_one > 0, num_other > 0))
    return scores


def _surface_measures(one: np.ndarray, other: np.ndarray, spacing_mm: Spacing, tolerance_mm: float) -> tuple[float, float]:
    """HD95 and surface Dice of two masks [H, W, D], at least one of them not empty."""
    if not (one.any() and other.any()):
        return math.hypot(*(n * s for n, s in zip(one.shape, spacing_mm, strict=True))), 0.0
    box = _bounding_box(one | other)  # all surfaces lie in it, so that distances are those of the whole image
    there, back = _surface_distances(one[box], other[box], spacing_mm)
    within = np.count_nonzero(there <= tolerance_mm) + np.count_nonzero(back <= tolerance_mm)
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return float(hd95), within / (len(there) + len(back))


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        along = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(along[0]), int(along[-1]) + 1))
    return tuple(box)


def _surface_distances(one: np.ndarray, other: np.ndarray, spacing_mm: Spacing) -> tuple[np.ndarray, np.ndarray]:
    """Distance (mm) of each surface voxel to the other mask's surface: from one to the other, and back.

    A surface voxel has one of its six neighbours outside its mask; beyond the image is outside.
    """
    surfaces = [mask & ~binary_erosion(mask) for mask in (one, other)]
    to_one, to_other = (distance_transform_edt(~surface, sampling=spacing_mm) for surface in surfaces)
    return to_other[surfaces[0]], to_one[surfaces[1]]


def _mean(values: Sequence[float]) -> float:
    """Of those that count; NaN where none does."""
    counted = [v for v in values if not math.isnan(v)]
    return sum(counted) / len(counted) if counted else NAN


def summarise(scores: Sequence[Score], names: Sequence[str], background: bool) -> dict[str, Any]:
    """Means of all cases.

    A mean over classes is taken in each case over the classes that count there, and then over cases.

    Args:
        scores: Of all cases and classes.
        names: Of the outputs, in order.
        background: Whether the first is the background (a recipe with classes).

    Returns:
        JSON types: `mean` of each measure, without the background; with one also `mean_with_background`; `per_class`;
        `num_cases`; `absent_in_both` (not counted) and `absent_in_one`, cases by class.
    """
    by_case: dict[str, list[Score]] = {}
    for score in scores:
        by_case.setdefault(score.case, []).append(score)

    def means(counted: Sequence[str]) -> dict[str, float]:
        cases = [[s for s in case if s.name in counted] for case in by_case.values()]
        return {m: _mean([_mean([getattr(s, m) for s in case]) for case in cases]) for m in MEASURES}

    of_class = {name: [s for s in scores if s.name == name] for name in names}
    both = {n: sum(not (s.in_prediction or s.in_target) for s in group) for n, group in of_class.items()}
    one = {n: sum(s.in_prediction != s.in_target for s in group) for n, group in of_class.items()}
    return {
        "mean": means(names[1:] if background else names),
        **({"mean_with_background": means(names)} if background else {}),
        "per_class": {n: {m: _mean([getattr(s, m) for s in group]) for m in MEASURES} for n, group in of_class.items()},
        "num_cases": len(by_case),
        "absent_in_both": {n: count for n, count in both.items() if count},
        "absent_in_one": {n: count for n, count in one.items() if count},
    }


def published_dice(scores: Sequence[Score], names: Sequence[str]) -> tuple[float, list[float]]:
    """Mean Dice and the Dice of each output as the published results count them; `summarise` has ours.

    The background counts, where there is one; what a case's truth does not have does not count there, whatever was predicted; 0
    where nothing counts.

    Args:
        scores: Of all cases and classes.
        names: Of the outputs, in order.

    Source: MONAI's `DiceMetric` (`ignore_empty`), its means over classes and then cases, and over cases.
    """
    by_case: dict[str, list[float]] = {}
    by_name: dict[str, list[float]] = {name: [] for name in names}
    for score in scores:
        if score.in_target:
            by_case.setdefault(score.case, []).append(score.dice)
            by_name[score.name].append(score.dice)
    mean = _mean([_mean(dice) for dice in by_case.values()]) if by_case else 0.0
    return mean, [_mean(dice) if dice else 0.0 for dice in by_name.values()]


def write_per_case_csv(path: str | Path, scores: Sequence[Score]) -> None:
    """The table of every case and class; what is not counted stays empty. Written aside and renamed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for score in scores:
        row = astuple(score)[: len(COLUMNS)]
        writer.writerow([*row[:2], *("" if math.isnan(v) else f"{v:.6g}" for v in row[2:])])
    write_text(Path(path), text.getvalue())
