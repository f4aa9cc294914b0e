"""Training, validation and test parts of a set of cases: seeded, and never one patient in two parts."""

from __future__ import annotations

import csv
import io
import logging
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinov2.data.downstream.lists import SPLITS
from dinov2.data.volumes.formats import is_scan_path, scans_in, stem
from dinov2.errors import BadInput
from dinov2.files import path_for_list, path_in_list, read_json, read_text, user_path

logger = logging.getLogger(__name__)

BIDS = r"(sub-[^_]+)"
CHANNEL = re.compile(r"_(\d{4})$")  # of nnU-Net's imagesTr: NAME_0000, NAME_0001, ... beside labelsTr's NAME
_NO_VALUES = ("", "n/a", "#n/a", "<na>", "nat")  # and `nan`; `none` and `na` can be the name of a class
Row = dict[str, Any]


def split_patients(rows: Sequence[Row], counts: Sequence[int], seed: int) -> dict[str, list[Row]]:
    """Deal patients out at random.

    Args:
        rows: Items with `case`, and `patient` where a patient has several.
        counts: Patients of training, validation and test, all of them together.
        seed: Of `random.Random`; the order of the rows does not matter.

    Raises:
        ValueError: Counts that are not those of the patients.
    """
    of_patient: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: str(row["case"])):
        of_patient.setdefault(str(row.get("patient", row["case"])), []).append(row)
    patients = sorted(of_patient)
    if sum(counts) != len(patients):
        raise ValueError(f"{list(counts)} patients to deal out, there are {len(patients)}")
    random.Random(seed).shuffle(patients)
    parts, start = {}, 0
    for split, count in zip(SPLITS, counts, strict=True):
        parts[split] = [row for patient in patients[start : start + count] for row in of_patient[patient]]
        start += count
    return parts


def split_scans(rows: Sequence[Row], counts: Sequence[int], seed: int) -> dict[str, list[Row]]:
    """Deal patients out at random so that the parts' scans come nearest to the wanted counts.

    Patients with many scans go first, each to the part that lacks most; those with one scan even the parts out.

    Args:
        rows: Items with `case` and `patient`.
        counts: Scans of training, validation and test; taken as shares where there are more or fewer scans.
        seed: Of `random.Random`; the order of the rows does not matter.
    """
    of_patient: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: str(row["case"])):
        of_patient.setdefault(str(row["patient"]), []).append(row)
    patients = sorted(of_patient)
    random.Random(seed).shuffle(patients)
    lacking = {split: count * len(rows) / sum(counts) for split, count in zip(SPLITS, counts, strict=True)}
    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for patient in sorted(patients, key=lambda patient: -len(of_patient[patient])):
        split = max(SPLITS, key=lambda split: lacking[split])
        parts[split] += of_patient[patient]
        lacking[split] -= len(of_patient[patient])
    return parts


def read_table(path: Path, image_column: str, label_column: str, patient_column: str | None) -> list[Row]:
    """Rows of a classification or regression from a CSV file, paths starting at its folder; numbers are read as numbers.

    Raises:
        BadInput: It cannot be read, a column is missing, or a row lacks its image, label or patient, or names no file.
    """
    text = read_text(path, f"--table {path}")
    try:
        table = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as err:
        raise BadInput(f"--table {path}: cannot be read: {err}") from err
    if not table:
        raise BadInput(f"--table {path}: has no rows: give a CSV file with a first line of column names")
    wanted = [image_column, label_column, *([patient_column] if patient_column else [])]
    missing = [name for name in wanted if name not in table[0]]
    if missing:
        raise BadInput(f"--table {path}: has no column {missing[0]}: it has {', '.join(k for k in table[0] if k)}")
    rows: list[Row] = []
    for number, line in enumerate(table, 2):
        where = f"--table {path}, line {number}"
        empty = [name for name in wanted if is_empty_cell(line[name])]
        if empty:
            found = f"is {line[empty[0]].strip()}, no value" if (line[empty[0]] or "").strip() else "is empty"
            raise BadInput(f"{where}: {empty[0]} {found}: complete it or remove the line")
        image = _image_of(line[image_column].strip(), path.parent, where)
        patient = {"patient": line[patient_column].strip()} if patient_column else {}
        label = _number_or_word(line[label_column].strip())
        rows.append({"case": stem(image), **patient, "image": image, "label": label})
    if len({row["case"] for row in rows}) < len(rows):  # the same file names in several folders
        rows = [{**row, "case": str(Path(path_for_list(row["image"], path.parent)).with_name(row["case"]))} for row in rows]
    if not patient_column:
        whose = patients_of([row["case"] for row in rows], None)
        rows = [{**row, "patient": whose[row["case"]]} for row in rows]
    return rows


def is_empty_cell(text: str | None) -> bool:
    """Whether a cell has no value: tables write one that is missing in several words."""
    word = (text or "").strip().casefold()
    try:
        return not math.isfinite(float(word))
    except ValueError:
        return word in _NO_VALUES


def _image_of(given: str, folder: Path, where: str) -> Path:
    """The scan that a cell names, as the table's writer or as Windows spells paths.

    Raises:
        BadInput: It is not there.
    """
    spellings = (given, given.replace("\\", "/"))
    for spelling in spellings:
        if is_scan_path(found := path_in_list(spelling, folder)):
            return Path(found)
    missing = path_in_list(spellings[1], folder)
    raise BadInput(f"{where}: no such file or DICOM folder {missing}: correct it, or complete the data")


def _number_or_word(text: str) -> float | int | str:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def counts_of_fractions(num_patients: int, fractions: Sequence[float]) -> list[int]:
    """Patients a part; each part has at least one.

    Raises:
        BadInput: Fractions that do not add up to 1, or too few patients.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise BadInput(f"--fractions {' '.join(f'{f:g}' for f in fractions)}: give three above 0 that add up to 1")
    if num_patients < 3:
        raise BadInput(f"{num_patients} patients cannot be split: training, validation and test need one each")
    validation, test = (max(1, round(f * num_patients)) for f in fractions[1:])
    while validation + test >= num_patients:
        validation, test = max(1, validation - 1), max(1, test - 1)
    return [num_patients - validation - test, validation, test]


def find_pairs(images: Path, labels: Path, patient_pattern: str | None, ending: str = "") -> list[Row]:
    """Images and label maps of two folders by their names; nnU-Net's channels (`_0000`, ...) too.

    Args:
        images: Folder of images.
        labels: Folder of label maps, each of an image's name.
        patient_pattern: Regular expression with one group, which finds the patient in a case's name; None: `sub-...` where
            every name has one (BIDS), otherwise a case is a patient.
        ending: Of the files that count.

    Returns:
        Rows with `case`, `patient`, `image` or `image1`, `image2`, ..., and `label`, by name.

    Raises:
        BadInput: A folder without files, a label without image, unequal channels, a name without patient.
    """
    label_of = _by_name(labels, "--labels", ending, stem)

    def case_of(path: Path) -> str:
        return name if (name := stem(path)) in label_of else CHANNEL.sub("", name)

    channels_of = _by_name(images, "--images", ending, case_of)
    unpaired = sorted(set(label_of) - set(channels_of))
    if unpaired:
        raise BadInput(f"{label_of[unpaired[0]][0]} has no image of that name in {images}: rename one, or leave the label out")
    left_over = sorted(set(channels_of) - set(label_of))
    if left_over:
        logger.warning("%d images have no label and are left out, among them %s", len(left_over), left_over[0])
    names = sorted(label_of)
    usual = len(channels_of[names[0]])
    for name in names:
        if len(channels_of[name]) != usual:
            raise BadInput(
                f"{name} has {len(channels_of[name])} channels in {images}, {names[0]} has {usual}: complete the data"
            )
    return segmentation_rows({name: (channels_of[name], label_of[name][0]) for name in names}, patient_pattern)


def segmentation_rows(files: Mapping[str, tuple[Sequence[Path], Path]], patient_pattern: str | None) -> list[Row]:
    """Rows of cases by name, from their images (one, or one for each channel) and label maps.

    Raises:
        BadInput: As of `patients_of`.
    """
    patients = patients_of(list(files), patient_pattern)
    rows: list[Row] = []
    for name, (images, label) in files.items():
        keys = ["image"] if len(images) == 1 else [f"image{c + 1}" for c in range(len(images))]
        rows.append({"case": name, "patient": patients[name], **dict(zip(keys, images, strict=True)), "label": label})
    return rows


def _by_name(folder: Path, flag: str, ending: str, name: Callable[[Path], str]) -> dict[str, list[Path]]:
    """Scans of a folder (files of an ending, DICOM folders) by their case's name, in order."""
    try:
        files = [path for path in scans_in(folder) if path.name.endswith(ending)]
    except OSError as err:
        raise BadInput(f"{flag} {folder}: {err.strerror}") from err
    if not files:
        raise BadInput(f"{flag} {folder}: holds no {f'{ending} ' if ending else ''}image files")
    found: dict[str, list[Path]] = {}
    for path in files:
        found.setdefault(name(Path(user_path(path))), []).append(path)
    return found


def patients_of(names: Sequence[str], pattern: str | None) -> dict[str, str]:
    """Whose each case is.

    Raises:
        BadInput: A pattern without exactly one group, or a name that it does not match.
    """
    if pattern is None:
        found = {name: match[1] for name in names if (match := re.search(BIDS, name))}
        return found if all(name in found for name in names) else {name: name for name in names}
    try:
        compiled = re.compile(pattern)
    except re.error as err:
        raise BadInput(f"--patient {pattern!r} is not a regular expression: {err}") from err
    if compiled.groups != 1:
        raise BadInput(f"--patient {pattern!r} must have one group, as in '^(pat\\d+)_'")
    patients = {}
    for name in names:
        match = compiled.search(name)
        if match is None:
            raise BadInput(f"--patient {pattern!r} does not match {name!r}")
        patients[name] = match[1]
    return patients


def split_as_listed(rows: Sequence[Row], listed: Mapping[str, Sequence[str]]) -> dict[str, list[Row]]:
    """The parts that a file fixes, by case or file name.

    Raises:
        BadInput: A listed case that is not there.
    """
    by_name = {row["case"]: row for row in rows}
    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for name in listed[split]:
            if stem(name) not in by_name:
                raise BadInput(f"{name} of the fixed {split} part is not among the {len(rows)} cases: complete the data")
            parts[split].append(by_name[stem(name)])
    return parts


def read_parts(path: Path, key: str | None) -> dict[str, list[str]]:
    """A JSON file with the names of each part, at its top or below a key.

    Raises:
        BadInput: Not such a file.
    """
    content = read_json(path, f"--parts {path}")
    found = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(found, dict) or not all(isinstance(found.get(split), list) for split in SPLITS):
        where = f"under {key!r}" if key else "at its top (--parts-key names another place)"
        raise BadInput(f"--parts {path}: no training, validation and test lists {where}")
    return {split: [str(name) for name in found[split]] for split in SPLITS}
