"""Downstream datasets: one YAML file (`configs/eval/datasets`) says all that is particular to one, beside its datalist.

R outputs: classes (background included), regions or bins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov2.configs.errors import ConfigError, nearest
from dinov2.configs.loader import load_typed, recipe_folders
from dinov2.configs.schema import key, require, require_choice, section
from dinov2.data.preprocess import PERCENTILES
from dinov2.files import user_path

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "eval/datasets"
TASKS = ("segmentation", "classification", "regression")
ONE_OF = ("affine", "gamma", "sharpen", "smooth", "noise")
CROPS = ("random", "pos_neg")
LOSSES = ("dice", "dice_ce")
TERTILES = "tertiles"  # as bins
IGNORED = -1  # what a voxel of `Recipe.ignore` has for a label once a case is prepared
MAX_LABEL = 32767  # labels are kept in 16 bits
# which label values make up the tumour core, whole tumour and enhancing tumour in each year's files
LABEL_SCHEMES: dict[str, dict[str, list[int]]] = {
    "brats2013": {"TC": [1, 3, 4], "WT": [1, 2, 3, 4], "ET": [4]},  # 1 necrosis, 2 oedema, 3 non-enhancing, 4 enhancing
    "brats2021": {"TC": [1, 4], "WT": [1, 2, 4], "ET": [4]},  # 1 necrosis and non-enhancing, 2 oedema, 4 enhancing
    "brats2023": {"TC": [1, 3], "WT": [1, 2, 3], "ET": [3]},  # 1 necrosis and non-enhancing, 2 oedema, 3 enhancing
    "decathlon": {"TC": [2, 3], "WT": [1, 2, 3], "ET": [3]},  # its dataset.json: 1 edema, 2 non-enhancing, 3 enhancing
}


@dataclass(frozen=True)
class Space:
    """The grid that images are brought to."""

    orientation: str = key("RAS", "where the axes point, of R/L, A/P and S/I each once, the slice axis last")
    spacing_mm: list[float] | None = key(None, "voxel size along these axes; null: the file's own")

    def __post_init__(self) -> None:
        letters = self.orientation
        ok = len(letters) == 3 and all(sum(c in pair for c in letters) == 1 for pair in ("RL", "AP", "SI"))
        require(ok, f"space.orientation={letters!r} must have one letter each of R/L, A/P and S/I, for example RAS")
        s = self.spacing_mm
        require(s is None or (len(s) == 3 and min(s) > 0), f"space.spacing_mm={s} must be three positive numbers (mm)")


@dataclass(frozen=True)
class Intensity:
    """What is mapped to -1 and 1, the rest being clipped."""

    window: list[float] | None = key(None, "[low, high] in the file's units, such as Hounsfield units")
    percentiles: list[float] | None = key(None, "[low, high] of each channel; default, without a window: 0.05 and 99.95")

    def __post_init__(self) -> None:
        require(not (self.window and self.percentiles), "intensity has a window and percentiles: keep one of them")
        for name, value in (("window", self.window), ("percentiles", self.percentiles)):
            ok = value is None or (len(value) == 2 and value[0] < value[1])
            require(ok, f"intensity.{name}={value} must be [low, high] with low < high")
        p = self.percentiles
        require(p is None or (p[0] >= 0 and p[1] <= 100), f"intensity.percentiles={p} must lie within 0 and 100")

    def limits(self, channel: np.ndarray) -> tuple[float, float]:
        """The values that become -1 and 1 of one channel's voxels."""
        if self.window:
            return self.window[0], self.window[1]
        low, high = np.percentile(channel, self.percentiles or PERCENTILES)
        return float(low), float(high)


@dataclass(frozen=True)
class Training:
    """Crops, their augmentation, and the loss."""

    crop: str = key("random", "where crops lie: random, or pos_neg (centred on a labelled or on a background voxel, 1:1)")
    crops_per_volume: int = key(4, "crops of one volume in a batch item")
    foreground_crop: bool = key(False, "crops come from the bounding box of what is above the lowest intensity")
    flip_p: float = key(0.0, "probability of a flip, for each of flip_axes")
    flip_axes: list[int] = key([0, 1, 2], "axes that may be flipped")
    rot90_p: float = key(0.0, "probability of a turn by 90, 180 or 270 degrees in the plane of the first two axes")
    scale: float = key(0.0, "intensities times 1 + u, u uniform within +- this")
    scale_p: float = key(1.0, "probability of the scaling")
    shift: float = key(0.0, "intensities (-1 to 1) plus u, u uniform within +- this")
    shift_p: float = key(1.0, "probability of the shift")
    one_of: list[str] = key([], "of these one is chosen each time (classification): affine, gamma, sharpen, smooth, noise")
    one_of_p: float = key(0.3, "probability that the chosen one is applied")
    loss: str = key(
        "dice_ce", "of a segmentation: dice or dice_ce; overlapping regions through a sigmoid, classes through a softmax"
    )
    dice_squared: bool = key(False, "the Dice loss's denominator has squares")

    def __post_init__(self) -> None:
        require_choice("train.crop", self.crop, CROPS)
        require_choice("train.loss", self.loss, LOSSES)
        require(self.crops_per_volume > 0, f"train.crops_per_volume={self.crops_per_volume} must be at least 1")
        for name in ("flip_p", "rot90_p", "scale_p", "shift_p", "one_of_p"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"train.{name}={value} must be a probability, 0 to 1")
        for name in ("scale", "shift"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}={value} must be at least 0 and below 1")
        for name in self.one_of:
            require_choice("train.one_of", name, ONE_OF)
        require(set(self.flip_axes) <= {0, 1, 2}, f"train.flip_axes={self.flip_axes} must be of 0, 1, 2")


@dataclass(frozen=True)
class Metrics:
    """What the metrics of a dataset need to know."""

    nsd_tolerance_mm: float = key(1.0, "distance within which a surface counts as found (normalised surface Dice)")

    def __post_init__(self) -> None:
        require(self.nsd_tolerance_mm >= 0, f"metrics.nsd_tolerance_mm={self.nsd_tolerance_mm} must not be negative")


@dataclass(frozen=True)
class Recipe:
    """One downstream dataset; made by `load_recipe`."""

    task: str = key("segmentation", "segmentation, classification, or regression (a number)")
    channels: int = key(1, "images of one case")
    classes: dict[int, str] | None = key(None, "name of each label value from 0, 0 being the background in a segmentation")
    regions: Any = key(None, "label values that make up each of several overlapping regions, or the name of a label scheme")
    bins: Any = key(None, "[from, to) of each class of a number, such as an age, or tertiles: thirds of the training labels")
    outside_bins: str = key(
        "refuse", "a number in none of the bins is refused, or its case left out and counted (leave_out)", is_decisive=False
    )
    label_map: dict[int, int] | None = key(None, "stored label value: the value it is read as")
    ignore: list[int] = key([], "stored label values of voxels that no loss and no metric looks at (segmentation)")
    space: Space = section(Space)
    intensity: Intensity = section(Intensity)
    resize: list[int] | None = key(None, "shape (voxels) that images are resized to after the resampling")
    skull_stripped: bool = key(False, "scans are brains without skull; one that looks otherwise is warned of")
    train: Training = section(Training)
    metrics: Metrics = section(Metrics)
    name: str = key("", "of the datalist, NAME_100_datalist.json; default: the file's")

    def __post_init__(self) -> None:
        require_choice("task", self.task, TASKS)
        require(self.channels > 0, f"channels={self.channels} must be at least 1")
        given = [n for n in ("classes", "regions", "bins") if getattr(self, n)]
        allowed = ("classes", "regions") if self.task == "segmentation" else ("classes", "bins")
        ok = len(given) == 1 and given[0] in allowed if self.task != "regression" else not given
        wanted = "none" if self.task == "regression" else f"exactly one of {' and '.join(allowed)}"
        require(ok, f"{self.task} needs {wanted}, got {' and '.join(given) or 'none'}")
        if self.classes:
            in_order = list(self.classes) == list(range(len(self.classes))) and len(self.classes) > 1
            require(in_order, f"classes={dict(self.classes)} must be named 0, 1, 2, ... in order (label_map renames values)")
        if self.regions:
            object.__setattr__(self, "regions", _regions(self.regions))
        if self.bins and self.bins != TERTILES:
            _check_bins(self.bins)
        require_choice("outside_bins", self.outside_bins, ("refuse", "leave_out"))
        require(
            bool(self.bins) or self.outside_bins == "refuse", f"outside_bins={self.outside_bins} without bins: leave it out"
        )
        require(not self.ignore or self.task == "segmentation", f"ignore={self.ignore} is for a segmentation")
        both = sorted(set(self.ignore) & {*self.values, *(self.label_map or {})})
        require(not both, f"ignore={self.ignore} and the recipe's classes, regions or label_map both have {both}")
        shape = self.resize
        require(shape is None or (len(shape) == 3 and min(shape) > 0), f"resize={shape} must be three positive voxel counts")
        segmentation, plan = self.task == "segmentation", self.train
        require(not (shape and segmentation), "resize is for classification; a segmentation is resampled")
        require(not (plan.one_of and segmentation), f"train.one_of={plan.one_of} is for classification")
        centred = "train.crop=pos_neg is centred on labelled voxels, which only a segmentation has: use random"
        require(segmentation or plan.crop == "random", centred)
        unknown = sorted(set((self.label_map or {}).values()) - set(self.values)) if self.task == "segmentation" else []
        require(not unknown, f"label_map leads to {unknown}, which are not among the recipe's values {list(self.values)}")

    @property
    def overlapping(self) -> bool:
        """Whether a voxel can be in several outputs (regions: a sigmoid each) or in exactly one (classes: a softmax)."""
        return bool(self.regions)

    @property
    def output_names(self) -> list[str]:
        """Names of the network's outputs, in their order; of a segmentation by classes, the background is the first."""
        if self.task == "regression":
            return ["value"]
        return list(self.regions or self.bins or (self.classes or {}).values())

    @property
    def num_outputs(self) -> int:
        return len(self.output_names)

    @property
    def values(self) -> tuple[int, ...]:
        """Label values that a prepared segmentation may hold, ascending."""
        if self.regions:
            return tuple(sorted({0}.union(*self.regions.values())))
        return tuple(self.classes or ())

    @property
    def _groups(self) -> list[list[int]]:
        """Label values of each output."""
        return list(self.regions.values()) if self.regions else [[v] for v in self.values]

    def masks(self, label: Tensor) -> Tensor:
        """A label map as one mask per output.

        Args:
            label: [..., 1, H, W, D] integers, values of `values`, or `IGNORED`, which is in no mask.

        Returns:
            [..., R, H, W, D] bool.
        """
        import torch  # here, so that lists and recipes are checked without it

        return torch.cat([torch.isin(label, torch.tensor(group, device=label.device)) for group in self._groups], dim=-4)

    def compose(self, masks: Tensor) -> Tensor:
        """One label map from masks: what `predict` writes.

        A voxel gets the label value whose membership comes closest to the masks' (they need not be nested as the regions are);
        of several the one in most regions, then the smallest.

        Args:
            masks: [R, H, W, D] bool.

        Returns:
            [1, H, W, D] int16.
        """
        import torch

        if not self.overlapping:
            return masks.to(torch.int16).argmax(0, keepdim=True).to(torch.int16)
        weights = 2 ** torch.arange(self.num_outputs, device=masks.device).reshape(-1, 1, 1, 1)
        patterns = (masks * weights).sum(0, keepdim=True)  # [1, H, W, D], each combination of regions a number
        return self._value_of_pattern.to(masks.device)[patterns]

    @cached_property
    def _value_of_pattern(self) -> Tensor:
        """[2**R] int16: the label value of each combination of regions."""
        import torch

        members = {v: [v in group for group in self._groups] for v in self.values}

        def closest(pattern: int) -> int:
            bits = [bool(pattern >> r & 1) for r in range(self.num_outputs)]
            distance = {v: sum(a != b for a, b in zip(row, bits, strict=True)) for v, row in members.items()}
            return min(members, key=lambda v: (distance[v], -sum(members[v]), v))

        return torch.tensor([closest(p) for p in range(2**self.num_outputs)], dtype=torch.int16)


def _check_bins(given: Any) -> None:
    """Raise `ConfigError` where bins are not ranges of numbers by name."""
    require(isinstance(given, Mapping), f"bins={given!r} must be {TERTILES}, or {{name: [from, to)}}")
    for name, edges in given.items():
        ok = (
            isinstance(edges, list)
            and len(edges) == 2
            and all(isinstance(e, (int, float)) for e in edges)
            and edges[0] < edges[1]
        )
        require(ok, f"bins.{name}={edges} must be [from, to) with from < to")


def _regions(given: Any) -> dict[str, list[int]]:
    """Regions spelled out, from a scheme's name or as given.

    Raises:
        ConfigError: An unknown scheme, or values that are not positive whole numbers.
    """
    if isinstance(given, str):
        require_choice("regions", given, tuple(LABEL_SCHEMES))
        given = LABEL_SCHEMES[given]
    require(isinstance(given, Mapping), f"regions={given!r} must be a label scheme or {{name: [label values]}}")
    for name, group in given.items():
        ok = isinstance(group, list) and len(group) > 0 and all(type(v) is int and 0 < v <= MAX_LABEL for v in group)
        require(ok, f"regions.{name}={group!r} must be a list of label values above 0")
    return {str(name): list(group) for name, group in given.items()}


def scheme_hint(recipe: Recipe, labels: Iterable[int]) -> str:
    """What to do about a BraTS file of another year: the label schemes that have its values; empty where none has."""
    fitting = [name for name, regions in LABEL_SCHEMES.items() if {0}.union(*regions.values()) >= {0, *labels}]
    if recipe.regions not in LABEL_SCHEMES.values() or not fitting:
        return ""
    newest = sorted(fitting, key=lambda name: name != "brats2023")
    others = f" (or {', '.join(newest[1:])})" if newest[1:] else ""
    return (
        f"for files of another year make a recipe of two lines, `base: eval/datasets/BraTS` and `regions: {newest[0]}`{others}"
    )


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A dataset recipe, from a YAML file or by its name in `configs/eval/datasets`, in this order.

    A file may begin from another one by ``base: eval/datasets/NAME``.

    Raises:
        ConfigError: No such file or name, an unknown key, or a value that cannot be used; one line.
    """
    path = Path(user_path(name_or_path))
    if not path.is_file():
        folders = [folder / FOLDER for folder in recipe_folders()]
        known = {p.stem: p for folder in folders for p in sorted(folder.glob("*.yaml"))}
        if str(name_or_path) not in known:
            hint = nearest(str(name_or_path), known) or f" (known: {', '.join(known)})"
            raise ConfigError(f"{name_or_path}: no such recipe file, and no dataset of that name{hint}")
        path = known[str(name_or_path)]
    recipe: Recipe = load_typed(Recipe, path)
    return recipe if recipe.name else dataclasses.replace(recipe, name=path.stem)
