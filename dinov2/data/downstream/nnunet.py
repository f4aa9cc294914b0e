"""nnU-Net's raw folders: `dataset.json` beside `imagesTr` and `labelsTr`, read into cases and the text of a recipe.

Of version 2 (`channel_names`, `labels` from names to values, or to lists of values for regions; `dataset` where files lie
elsewhere), and the older form of version 1 and the Decathlon (`modality`, `labels` from values to names, `training`).
"""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dinov2.configs.errors import ConfigError
from dinov2.data.downstream.recipes import Recipe
from dinov2.data.downstream.split import Row, find_pairs, segmentation_rows
from dinov2.data.volumes.formats import FORMAT_NAMES, format_by_name, stem
from dinov2.errors import BadInput
from dinov2.files import path_in_list, read_json, read_text, write_text

logger = logging.getLogger(__name__)

DESCRIPTION = "dataset.json"
LIST_ENDING = "_100_datalist.json"
CT_COMMENT = """\
# {names} is CT: give the window that becomes -1 to 1 in Hounsfield units; without it its own percentiles do, as
# intensity: {{window: [-175, 250]}}
"""


def read_nnunet(folder: Path, patient_pattern: str | None) -> tuple[list[Row], str]:
    """The cases of a raw folder, and a recipe for them.

    Args:
        folder: With `dataset.json`, such as `Dataset004_Hippocampus`.
        patient_pattern: As of `find_pairs`.

    Returns:
        Rows as of `find_pairs`, and YAML.

    Raises:
        BadInput: No such folder, a description that cannot be used, or files that are not those it describes.
    """
    path = folder / DESCRIPTION
    content = _load(path)
    channels = _channels(content, path)
    outputs = _outputs(content, path)
    listed = _listed(content, path)
    rows = segmentation_rows(listed, patient_pattern) if listed else _found(content, path, patient_pattern)
    for row in rows:
        images = [key for key in row if key.startswith("image")]
        if images != ["image"] and len(images) != len(channels):  # one file may hold all channels along its fourth axis
            raise BadInput(f"{path}: {row['case']} has {len(images)} images for {len(channels)} channels: complete the data")
        for file in (row[key] for key in (*images, "label")):
            if not file.is_file():
                raise BadInput(f"{path}: no such file {file}: complete the data, or correct {DESCRIPTION}")
    wanted = content.get("numTraining")
    if isinstance(wanted, int) and wanted != len(rows):
        logger.warning("%s: numTraining is %d, %d cases with a label are there", path, wanted, len(rows))
    return rows, _recipe_text(folder, channels, outputs)


def write_recipe(datalist: Path, text: str) -> Path:
    """Write a recipe beside a list, under the name that leads to it; one that is there and the same stays.

    Returns:
        Its path.

    Raises:
        BadInput: The list has no such name, another recipe is there, or it cannot be written.
    """
    if not datalist.name.endswith(LIST_ENDING) or datalist.name == LIST_ENDING:
        raise BadInput(f"--output {datalist}: the recipe NAME.yaml is used with NAME{LIST_ENDING}: choose such a name")
    path = datalist.with_name(datalist.name.removesuffix(LIST_ENDING) + ".yaml")
    try:
        if path.exists() and read_text(path) != text:
            raise BadInput(
                f"{path}: another recipe is there: move it away, or keep it and make the list with --images and --labels"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as err:
        raise BadInput(f"{path}: {err.strerror}: choose another --output") from err
    return path


def label_names(path: Path) -> dict[tuple[int, ...], str]:
    """Of each class or region that a `dataset.json` describes its name, by its values in order.

    Raises:
        BadInput: It cannot be used.
    """
    outputs = _outputs(_load(path), path)
    groups = {name: [value] for value, name in outputs["classes"].items()} if "classes" in outputs else outputs["regions"]
    return {tuple(sorted(group)): name for name, group in groups.items()}


def _load(path: Path) -> dict[str, Any]:
    content = read_json(path, f"--nnunet {path}", "give the raw folder, such as Dataset004_Hippocampus")
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds a {type(content).__name__}, expected nnU-Net's channel_names and labels")
    return content


def _channels(content: Mapping[str, Any], path: Path) -> list[str]:
    """Names of the channels, in their order."""
    given = content.get("channel_names", content.get("modality"))
    if not isinstance(given, dict) or sorted(given) != sorted(str(c) for c in range(len(given))) or not given:
        raise BadInput(f'{path}: channel_names is {json.dumps(given)}, expected {{"0": name, "1": name, ...}}')
    return [str(given[str(c)]) for c in range(len(given))]


def _outputs(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`classes` or `regions` of the recipe, and `ignore`.

    Raises:
        BadInput: Labels of neither form.
    """
    labels = content.get("labels")
    if not isinstance(labels, dict):
        raise BadInput(f'{path}: labels is {json.dumps(labels)}, expected {{"background": 0, name: value, ...}}')
    if labels and all(key.isdecimal() and isinstance(name, str) for key, name in labels.items()):
        labels = {name: int(value) for value, name in labels.items()}  # version 1
    ignored = labels.get("ignore")
    if ignored is not None and type(ignored) is not int:
        raise BadInput(f"{path}: labels.ignore is {json.dumps(ignored)}, expected a whole number")
    labels = {name: value for name, value in labels.items() if name != "ignore"}
    groups = {str(name): value if isinstance(value, list) else [value] for name, value in labels.items()}
    for name, group in groups.items():
        if not group or not all(type(value) is int and value >= 0 for value in group):
            raise BadInput(f"{path}: labels.{name} is {json.dumps(labels[name])}, expected a whole number or a list of them")
    if any(len(group) > 1 for group in groups.values()):
        outputs: dict[str, Any] = {"regions": {name: group for name, group in groups.items() if group != [0]}}
    else:
        outputs = {"classes": dict(sorted((group[0], name) for name, group in groups.items()))}
        if len(outputs["classes"]) < len(groups):
            raise BadInput(f"{path}: labels is {json.dumps(labels)}: two names have one value")
    if ignored is not None:
        outputs["ignore"] = [ignored]
    try:
        Recipe(**outputs)
    except ConfigError as err:
        raise BadInput(f"{path}: its labels are no recipe's: {err}") from err
    return outputs


def _found(content: Mapping[str, Any], path: Path, patient_pattern: str | None) -> list[Row]:
    """Cases by the names of the files in `imagesTr` and `labelsTr`."""
    ending = content.get("file_ending", "")
    if not isinstance(ending, str) or (ending and format_by_name(f"case{ending}") is None):
        raise BadInput(f"{path}: file_ending {json.dumps(ending)} is of no format that is read: convert to {FORMAT_NAMES}")
    return find_pairs(path.parent / "imagesTr", path.parent / "labelsTr", patient_pattern, ending)


def _listed(content: Mapping[str, Any], path: Path) -> dict[str, tuple[Sequence[Path], Path]]:
    """Images and label of each case that the description lists; none where it lists none."""
    try:
        if "dataset" in content:
            return {
                case: ([_beside(path, image) for image in given["images"]], _beside(path, given["label"]))
                for case, given in sorted(content["dataset"].items())
            }
        pairs = [(_beside(path, given["image"]), _beside(path, given["label"])) for given in content.get("training", [])]
    except (TypeError, KeyError, AttributeError) as err:
        raise BadInput(f"{path}: its list of cases is not nnU-Net's: expected image (or images) and label of each") from err
    return {stem(label): (_files_of(image), label) for image, label in sorted(pairs)}


def _beside(description: Path, given: str) -> Path:
    return Path(path_in_list(given, description.parent))


def _files_of(image: Path) -> list[Path]:
    """The file, or where version 1 leaves out the channel's number, those of all channels."""
    name = stem(image)
    numbered = image.parent.glob(f"{glob.escape(name)}_[0-9][0-9][0-9][0-9]{image.name.removeprefix(name)}")
    return [image] if image.exists() else sorted(numbered) or [image]


def _recipe_text(folder: Path, channels: Sequence[str], outputs: Mapping[str, Any]) -> str:
    """YAML of a recipe; what nnU-Net takes from the data and a recipe says is left to the user, in a comment."""
    listed = ", ".join(f"{c} {name}" for c, name in enumerate(channels))
    ct = [name for name in channels if name.casefold() == "ct"]
    content = {"task": "segmentation", "channels": len(channels), **outputs, "train": {"crop": "pos_neg"}}
    return (
        f"# {folder.absolute().name}, as nnU-Net's {DESCRIPTION} describes it; channels: {listed}.\n"
        + "# By default on each file's own spacing: space: {spacing_mm: [x, y, z]} brings all to one.\n"
        + (CT_COMMENT.format(names=ct[0]) if ct else "")
        + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    )
