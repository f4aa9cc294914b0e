"""What the paper says of its comparison in words, as data, each with its place; a report has ours beside it.

Gains are relative, in per cent of the other method's value, as the paper counts them; figures that are only drawn are not here.

Source: Xu et al., A generalizable 3D framework and model for self-supervised learning in medical imaging.
"""

from __future__ import annotations

from dataclasses import dataclass

VALUE = "value"
NEXT_BEST = "gain over next best"
BASELINE = "gain over baseline"
MEAN_NEXT_BEST = "gain over next best, mean of fractions"
MOST_BASELINE = "gain over baseline, largest of fractions"
EQUIVALENCE = "label equivalence"
_TASKS = 'Results, "Performance on segmentation and classification tasks"'
_LINEAR = 'Results, "3DINO patch-level representations for image segmentation"'
_OOD = 'Results, "Performance on unseen organs and modalities"'


@dataclass(frozen=True)
class Said:
    """One number of the paper.

    Attributes:
        dataset: Data set, named as its recipe.
        percent: Of the training part; None: of all, or not said.
        kind: One of this file's.
        text: The number as the paper has it, in per cent but for `VALUE`.
        place: Where.
        method: Whose.
        label: Class that it is of; empty: all.
    """

    dataset: str
    percent: int | None
    kind: str
    text: str
    place: str
    method: str = "3DINO"
    label: str = ""


PAPER: dict[str, tuple[Said, ...]] = {
    "segmentation": (
        Said("BraTS", 10, VALUE, "0.90 (0.88 to 0.91)", _TASKS),
        Said("BraTS", 10, VALUE, "0.87 (0.85 to 0.89)", _TASKS, "Random"),
        Said("BTCV", 25, VALUE, "0.77 (0.72 to 0.81)", _TASKS),
        Said("BTCV", 25, VALUE, "0.59 (0.53 to 0.65)", _TASKS, "Random"),
        Said("BraTS", 100, NEXT_BEST, "0.8", _TASKS),
        Said("BTCV", 100, NEXT_BEST, "0.9", _TASKS),
        Said("BraTS", None, EQUIVALENCE, "below 50", _TASKS),
        Said("BTCV", None, EQUIVALENCE, "below 50", _TASKS),
        Said("BraTS", None, MOST_BASELINE, "13.0", "Discussion"),
        Said("BTCV", None, MOST_BASELINE, "55.1", "Discussion"),
        Said("BraTS", None, MOST_BASELINE, "5.1", "Discussion", "SwinTransfer"),
        Said("BTCV", None, MOST_BASELINE, "1.8", "Discussion", "SwinTransfer"),
    ),
    "classification": (
        Said("COVID-CT-MD", None, MEAN_NEXT_BEST, "18.9", _TASKS),
        Said("ICBM", None, MEAN_NEXT_BEST, "5.3", _TASKS),
        Said("COVID-CT-MD", None, MEAN_NEXT_BEST, "23", _TASKS, label="COVID-19"),
        Said("ICBM", None, MEAN_NEXT_BEST, "22 (of which fraction is not said)", _TASKS, label="40-49"),
    ),
    "linear_decoder": (
        Said("BTCV", None, MEAN_NEXT_BEST, "61 (of which fraction is not said)", _LINEAR),
        Said("BraTS", None, MEAN_NEXT_BEST, "15 (of which fraction is not said)", _LINEAR),
    ),
    "ood": (
        Said("LA-SEG", 5, NEXT_BEST, "23", "Discussion"),
        Said("LA-SEG", 10, NEXT_BEST, "9.3", "Discussion"),
        Said("LA-SEG", 25, NEXT_BEST, "1.9", _OOD),
        Said("LA-SEG", 100, NEXT_BEST, "1.1", _OOD),
        Said("TDSC-ABUS", 25, NEXT_BEST, "24", _OOD),
        Said("TDSC-ABUS", 100, NEXT_BEST, "0.8", _OOD),
    ),
}


def said(paper: str, dataset: str, percent: float | None, kind: str, method: str, label: str = "") -> Said | None:
    """What the paper has of one row of a report; None where it has nothing."""
    key = (dataset, percent, kind, method, label)
    return next((s for s in PAPER.get(paper, ()) if (s.dataset, s.percent, s.kind, s.method, s.label) == key), None)
