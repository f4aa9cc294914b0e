"""Scans to try the tutorials on, where none are at hand: the package's two heads, stretched and turned anew for every person.

What can be asked of them is made, too: whether a head was stretched or shrunk, and in which quarter of it a voxel lies.
They show how the commands work; results on them say nothing about an encoder.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from dinov2.errors import BadInput
from dinov2.files import replacing, write_json
from dinov2.geometry import Size3, triple

NUM_PEOPLE, NUM_UNLABELLED = 20, 2
SPACING_MM, EXTENT_MM = 3.0, (180, 216, 180)
SIZES = {"small": (0.84, 0.94), "large": (1.04, 1.14)}  # stretch of a head
LABELS = {"background": 0, "lower back": 1, "lower front": 2, "upper back": 3, "upper front": 4}
_HEADS = Path(__file__).with_name("scans")
Made = tuple[np.ndarray, np.ndarray]  # image and labels, [X, Y, Z]


def write_practice(folder: Path, num_people: int = NUM_PEOPLE, spacing_mm: float = SPACING_MM) -> None:
    """Write `scans/`, `people.csv` (a line a scan, its size) and `nnUNet_raw/Dataset001_Quarters` (two scans without labels).

    Args:
        folder: New, or empty.
        num_people: Scans; the same ones in all three.
        spacing_mm: Edge of a voxel.

    Raises:
        BadInput: There is something in the folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"--practice {folder}: is there and not empty: choose a new folder")
    data_set = folder / "nnUNet_raw" / "Dataset001_Quarters"
    affine = np.diag([spacing_mm] * 3 + [1.0])
    rows = []
    for i, (size, (image, labels)) in enumerate(people(num_people, spacing_mm)):
        name = f"person{i:02}"
        rows.append((f"scans/{name}.nii.gz", size))
        is_labelled = i < num_people - NUM_UNLABELLED
        _save(folder / "scans" / f"{name}.nii.gz", image, affine)
        _save(data_set / ("imagesTr" if is_labelled else "imagesTs") / f"{name}_0000.nii.gz", image, affine)
        if is_labelled:
            _save(data_set / "labelsTr" / f"{name}.nii.gz", labels, affine)
    with replacing(folder / "people.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("scan", "size"), *rows])
    description = {"channel_names": {"0": "T1"}, "labels": LABELS, "file_ending": ".nii.gz"}
    write_json(data_set / "dataset.json", {**description, "numTraining": num_people - NUM_UNLABELLED})


def people(num_people: int, spacing_mm: float) -> Iterator[tuple[str, Made]]:
    """Sizes and scans; each follows from its number alone."""
    files = [nib.Nifti1Image.from_filename(path) for path in sorted(_HEADS.glob("*.nii.gz"))]
    heads = [np.asarray(file.dataobj, np.float32) for file in files]
    shape = triple(round(mm / spacing_mm) for mm in EXTENT_MM)
    source_mm = float(files[0].header.get_zooms()[0])
    for i in range(num_people):
        size = list(SIZES)[i // len(heads) % 2]
        yield size, _made(heads[i % len(heads)], SIZES[size], np.random.default_rng(i), shape, spacing_mm / source_mm)


def _made(head: np.ndarray, stretch: tuple[float, float], rng: np.random.Generator, shape: Size3, step: float) -> Made:
    """One scan of a head: stretched, turned by up to 0.2 rad, with noise of its own.

    Args:
        shape: Of the scan, [X, Y, Z].
        step: Of its voxels, in those of the head.
    """
    angle = rng.uniform(-0.2, 0.2)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    matrix = turn / rng.uniform(*stretch, 3) * step
    offset = (np.array(head.shape) - 1) / 2 - matrix @ ((np.array(shape) - 1) / 2)
    image = ndimage.affine_transform(head, matrix, offset, shape, order=1)
    inside = image > 0.1 * head.max()
    image *= 1 + rng.normal(0, 0.03, shape)
    place = np.indices(shape, np.float32)
    middle = [np.mean(np.flatnonzero(inside.any(tuple({0, 1, 2} - {axis})))[[0, -1]]) for axis in range(3)]
    front, upper = place[1] > middle[1], place[2] > middle[2]
    return np.clip(image, 0, None).astype(np.int16), np.where(inside, 1 + front + 2 * upper, 0).astype(np.uint8)


def _save(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        nib.save(nib.Nifti1Image(voxels, affine), temporary)
