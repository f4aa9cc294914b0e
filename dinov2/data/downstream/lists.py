"""Downstream datalists: cases with labels in three parts, checked before anything runs; fractions of them.

`<dataset>_100_datalist.json` (segmentation) or `<dataset>_cls_datalist.json` (classification) is an object with the lists
`training`, `validation` and `test`; an item has `image`, or `image1`, `image2`, ... for several channels, and `label`: a path,
or a value. `case` (a name) and `patient` are taken where they are. `shuffle_seed` records that the training list was shuffled,
so that its first n items are a random subset.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.data.downstream.recipes import TERTILES, Recipe
from dinov2.data.names import names_apart
from dinov2.data.volumes.formats import format_by_name, is_scan_path
from dinov2.errors import BadInput
from dinov2.files import is_number, path_for_list, path_in_list, read_json, to_json, user_path, write_text

logger = logging.getLogger(__name__)

SPLITS = ("training", "validation", "test")


@dataclass(frozen=True)
class Item:
    """One case.

    Attributes:
        images: Absolute path of each channel, or of one file that holds all; of a DICOM series its folder, or one of its files.
        label: Path of the label map; of a classification the class's number, of a regression the value; None where there is
            none (prediction).
        case: A name that no other case of the list has.
        patient: Whose it is, where the list says it.
    """

    images: tuple[str, ...]
    label: str | float | None
    case: str
    patient: str | None = None


def datalist_path(base_data_dir: str | Path, recipe: Recipe) -> Path:
    """Where a dataset's list is."""
    kind = "100" if recipe.task == "segmentation" else "cls"
    return Path(user_path(base_data_dir)) / f"{recipe.name}_{kind}_datalist.json"


def read_downstream_datalist(base_data_dir: str | Path, recipe: Recipe) -> dict[str, list[Item]]:
    """Read a dataset's list and check it: form, channels, files, that no case or patient is in two parts.

    Whether images and labels fit each other is in their headers: `cases.check_headers`.

    Args:
        base_data_dir: Folder of the list; relative paths in it start there.
        recipe: The dataset's.

    Returns:
        Items of `training`, `validation` and `test`, in list order.

    Raises:
        BadInput: What is wrong, in one line, with the item.
    """
    path = datalist_path(base_data_dir, recipe)
    content = _load(path)
    if recipe.outside_bins == "leave_out":
        content = _within_bins(content, recipe, path)
    if "shuffle_seed" not in content:
        what = "%s does not say that its training list was shuffled (shuffle_seed): its first items may not be a random subset"
        logger.warning(what, path)
    places = [(split, i) for split in SPLITS for i in range(len(content[split]))]
    raw = [content[split][i] for split, i in places]
    where = [f"datalist {path}, {split} {i}" for split, i in places]
    images = [_images(item, recipe, path.parent, at) for item, at in zip(raw, where, strict=True)]
    labels = [_label(item, recipe, path.parent, at) for item, at in zip(raw, where, strict=True)]
    names = names_apart([item.get("case") for item in raw], images)
    items = [
        Item(paths, label, name, None if item.get("patient") is None else str(item["patient"]))
        for paths, label, name, item in zip(images, labels, names, raw, strict=True)
    ]
    _check_files(items, where)
    _check_disjoint(items, [split for split, _ in places], path)
    return {s: [item for item, (split, _) in zip(items, places, strict=True) if split == s] for s in SPLITS}


def _load(path: Path) -> dict[str, Any]:
    """A list whose parts are lists of objects, none of them empty."""
    content = read_json(path, f"datalist {path}", _instead_of(path))
    if not isinstance(content, dict):
        raise BadInput(f"datalist {path} holds a {type(content).__name__}, expected {{training, validation, test}}")
    for split in SPLITS:
        if not isinstance(content.get(split), list):
            raise BadInput(f"datalist {path} has no list {split!r}: it needs training, validation and test")
        for i, item in enumerate(content[split]):
            if not isinstance(item, dict):
                raise BadInput(
                    f"datalist {path}, {split} {i}: expected an object with image and label, got {json.dumps(item)[:80]}"
                )
    counts = {split: len(content[split]) for split in SPLITS}
    if not all(counts.values()):
        found = ", ".join(f"{n} {split}" for split, n in counts.items())
        raise BadInput(f"datalist {path} has {found}: each part needs a case, so one case only cannot be evaluated")
    return content


def _instead_of(path: Path) -> str:
    """What to do about a list that is not there; one of the other kind may be what was meant."""
    other = "_100_" if "_cls_" in path.name else "_cls_"
    beside = path.with_name(path.name.replace("_cls_" if other == "_100_" else "_100_", other))
    if beside.is_file():
        task = "segmentation" if other == "_100_" else "classification"
        return f"beside it is {beside.name}, the name of a {task}'s list: rename it, or give a recipe of that task"
    return "make it (docs/downstream.md) or give its folder as --base-data-dir"


def _images(item: dict[str, Any], recipe: Recipe, folder: Path, where: str) -> tuple[str, ...]:
    """Absolute paths of an item's channels."""
    given = [k for k in item if re.fullmatch(r"image\d*", k)]
    wanted = [f"image{c + 1}" for c in range(recipe.channels)]
    if given == ["image"]:
        wanted = ["image"]
    missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or extra:
        problem = f"{', '.join(missing)} is missing" if missing else f"{', '.join(extra)} is one too many"
        raise BadInput(f"{where} ({_brief(item)}): {problem}: {recipe.name} has {recipe.channels} channels")
    bad = [k for k in wanted if not isinstance(item[k], str) or not item[k]]
    if bad:
        raise BadInput(f"{where}: {bad[0]} must be a path, got {json.dumps(item[bad[0]])[:80]}")
    return tuple(path_in_list(item[k], folder) for k in wanted)


def _label(item: dict[str, Any], recipe: Recipe, folder: Path, where: str) -> str | float:
    """A label map's path, the number of the class that a value stands for, or the value of a regression."""
    value = item.get("label")
    if recipe.task == "segmentation":
        if not isinstance(value, str) or not value:
            raise BadInput(f"{where} ({_brief(item)}): label must be the path of a label map, got {json.dumps(value)[:80]}")
        return path_in_list(value, folder)
    if value is None:
        raise BadInput(f"{where} ({_brief(item)}): has no label: add it, or leave the case out of the list")
    if recipe.task == "regression":
        if not is_number(value):
            raise BadInput(f"{where} ({_brief(item)}): label {json.dumps(value)[:80]} is not a number: correct the list")
        return float(value)
    if recipe.bins:
        inside = [is_number(value) and low <= value < high for low, high in recipe.bins.values()]
    else:
        inside = [value in (number, name) for number, name in (recipe.classes or {}).items()]
    if not any(inside):
        classes = recipe.bins or recipe.classes or {}
        raise BadInput(f"{where} ({_brief(item)}): label {json.dumps(value)[:80]} is in none of the recipe's {dict(classes)}")
    return inside.index(True)


def _within_bins(content: dict[str, Any], recipe: Recipe, path: Path) -> dict[str, Any]:
    """A list without the cases whose number is in none of the bins; how many there were is said.

    Raises:
        BadInput: A part has no other cases.
    """

    def is_outside(item: dict[str, Any]) -> bool:
        value = item.get("label")
        return is_number(value) and not any(low <= value < high for low, high in recipe.bins.values())

    kept = {split: [item for item in content[split] if not is_outside(item)] for split in SPLITS}
    left_out = {split: len(content[split]) - len(kept[split]) for split in SPLITS}
    if any(left_out.values()):
        counts = ", ".join(f"{n} of {len(content[split])} {split}" for split, n in left_out.items())
        logger.warning("%s: left out %s cases, whose labels are in none of %s's bins", path, counts, recipe.name)
    empty = [split for split in SPLITS if not kept[split]]
    if empty:
        raise BadInput(f"datalist {path}: no case of its {empty[0]} part has a label in the recipe's bins {dict(recipe.bins)}")
    return {**content, **kept}


def with_tertiles(recipe: Recipe, base_data_dir: str | Path) -> Recipe:
    """The recipe, with `bins: tertiles` put into numbers: thirds of the training part's labels.

    Raises:
        BadInput: The list cannot be read, or its labels are not numbers of at least three values.
    """
    if recipe.bins != TERTILES:
        return recipe
    path = datalist_path(base_data_dir, recipe)
    values = [item.get("label") for item in _load(path)["training"]]
    for i, value in enumerate(values):
        if not is_number(value):
            raise BadInput(
                f"datalist {path}, training {i}: label {json.dumps(value)[:80]} is not a number, bins are {TERTILES}"
            )
    ordered = sorted(values)
    thirds = [ordered[round(len(ordered) * share)] for share in (1 / 3, 2 / 3)] if len(set(values)) > 2 else []
    if not thirds or not ordered[0] < thirds[0] < thirds[1]:
        raise BadInput(f"datalist {path}: its {len(values)} training labels have no thirds: declare bins in numbers")
    first, second = thirds
    bins = {f"below {first:g}": [-math.inf, first], f"{first:g} to {second:g}": [first, second]}
    return dataclasses.replace(recipe, bins={**bins, f"from {second:g}": [second, math.inf]})


def _brief(item: dict[str, Any]) -> str:
    return str(item.get("case") or item.get("image") or item.get("image1") or json.dumps(item)[:60])


def _check_files(items: Sequence[Item], where: Sequence[str]) -> None:
    for item, at in zip(items, where, strict=True):
        for path in (*item.images, *([item.label] if isinstance(item.label, str) else [])):
            if not is_scan_path(path):
                what = f"no such file or DICOM folder {path}: correct the list, or complete the data"
                raise BadInput(f"{at} ({item.case}): {what}")


def _check_disjoint(items: Sequence[Item], splits: Sequence[str], path: Path) -> None:
    """No image and no name twice, no patient in two parts."""
    seen: dict[tuple[str, str], str] = {}
    for item, split in zip(items, splits, strict=True):
        for what in (*(("image", p) for p in item.images), ("case", item.case)):
            if what in seen:
                raise BadInput(f"datalist {path}: {what[0]} {what[1]} is in {seen[what]} and again in {split}: keep it once")
            seen[what] = split
    parts = {(item.patient, split) for item, split in zip(items, splits, strict=True) if item.patient is not None}
    both = [patient for patient, n in Counter(patient for patient, _ in parts).items() if n > 1]
    if both:
        found = " and ".join(split for split in SPLITS if (both[0], split) in parts)
        raise BadInput(f"datalist {path}: patient {both[0]} is in {found}: split by patients (dinov2 split)")


def percentage(value: str | float) -> float:
    """A share as a number, an int where it is whole: 25 and 25.0 name the same run."""
    number = float(value)
    return int(number) if number.is_integer() else number


def select_percent(items: Sequence[Item], percent: float, shuffle_seed: int | None = None) -> list[Item]:
    """The part of a training list that a label fraction stands for: its first ``round(n * percent / 100)`` items.

    Args:
        items: In list order.
        percent: Above 0, at most 100.
        shuffle_seed: Shuffle by `random.Random(seed)` first (classification); None: the order of the list (segmentation).

    Raises:
        BadInput: No percentage, or one that leaves no item.
    """
    if not 0 < percent <= 100:
        raise BadInput(f"--dataset-percent {percent:g}: must be above 0 and at most 100")
    chosen = list(items)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(chosen)
    count = round(len(chosen) * percent / 100)
    if count == 0:
        raise BadInput(
            f"--dataset-percent {percent:g} of {len(chosen)} training cases is none: use {100 / len(chosen):.0f} or more"
        )
    return chosen[:count]


def write_downstream_datalist(path: str | Path, splits: dict[str, list[dict[str, Any]]], seed: int) -> None:
    """Write a list, its training part shuffled by a seed that it records; paths become relative to its folder where they can.

    Written aside and renamed.

    Args:
        path: Of the list.
        splits: Items of `training`, `validation` and `test`, with paths.
        seed: Of `random.Random`.

    Raises:
        BadInput: The file cannot be written.
    """
    path = Path(path)

    def relative(key: str, value: Any) -> Any:
        if not isinstance(value, (str, Path)) or not re.fullmatch(r"image\d*|label", key):
            return value
        if key == "label" and isinstance(value, str) and format_by_name(value) is None:
            return value  # the name of a class
        return path_for_list(value, path.parent)

    rows = {split: [{k: relative(k, v) for k, v in item.items()} for item in splits[split]] for split in SPLITS}
    random.Random(seed).shuffle(rows["training"])
    lists = [f'"{split}": [\n' + ",\n".join(to_json(r) for r in rows[split]) + "\n]" for split in SPLITS]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f'{{"shuffle_seed": {seed},\n' + ",\n".join(lists) + "}\n")
    except OSError as err:
        raise BadInput(f"{path}: {err.strerror}: choose another file for the list") from err
