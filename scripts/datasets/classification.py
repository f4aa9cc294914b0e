"""Write <dataset>_cls_datalist.json for one of the paper's classification sets, as it comes from its publisher.

    python scripts/datasets/classification.py ICBM FOLDER --table ICBM.csv
    python scripts/datasets/classification.py COVID-CT-MD FOLDER

ICBM: a search of LONI's archive: skull-stripped NIfTI files, each in the folder named by its image id, and the archive's CSV of
them (Image Data ID, Subject, Age). Scans of ages outside 20 to 60 are left out. Patients are dealt out so that the parts' scans
come nearest to the paper's 756/151/233. COVID-CT-MD: DICOM slices in a folder for each patient; a volume of each is written
below --output-dir, and each class has the paper's counts. By --seed; the training list is shuffled by it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import nibabel as nib

from dinov2.data.downstream.lists import SPLITS, write_downstream_datalist
from dinov2.data.downstream.split import Row, split_patients, split_scans
from dinov2.data.volumes.dicom import dicom_files, open_series
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, BadInput

AGES = (20.0, 60.0)
ICBM_COUNTS = (756, 151, 233)
ICBM_COLUMNS = ("Image Data ID", "Subject", "Age")
COVID_COUNTS = {"Normal": (54, 7, 15), "COVID-19": (121, 15, 33), "Cap": (39, 8, 13)}  # folders "<name> Cases"


def icbm(source: Path, table: Path) -> list[Row]:
    """Scans of the table that are in the folder, ages 20 to 60.

    Raises:
        BadInput: The table cannot be used, or a scan of it is missing or several files.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise BadInput(f"--table {table}: cannot be read: {err}") from err
    missing = [name for name in ICBM_COLUMNS if not lines or name not in lines[0]]
    if missing:
        raise BadInput(f"--table {table}: has no column {missing[0]!r}: take the CSV that LONI's archive gives for the scans")
    files: dict[str, list[Path]] = {}
    for path in sorted(source.rglob("*.nii*")):
        files.setdefault(path.parent.name.lstrip("I"), []).append(path)
    rows = []
    for number, line in enumerate(lines, 2):
        name, subject, age = (line[column].strip() for column in ICBM_COLUMNS)
        try:
            label = float(age)
        except ValueError as err:
            raise BadInput(f"--table {table}, line {number}: Age {age!r} is not a number") from err
        if not AGES[0] <= label <= AGES[1]:
            continue
        found = files.get(name.lstrip("I"), [])
        if len(found) != 1:
            raise BadInput(f"{source}: {len(found)} NIfTI files in a folder {name} ({table}, line {number}), expected one")
        rows.append({"case": name, "patient": subject, "image": found[0], "label": label})
    return rows


def covid_ct_md(source: Path, volumes: Path) -> dict[str, list[Row]]:
    """Rows of each class; a volume that is there already is kept.

    Raises:
        BadInput: A folder is missing, or a patient's slices are no volume.
    """
    rows: dict[str, list[Row]] = {}
    volumes.mkdir(parents=True, exist_ok=True)
    for name in COVID_COUNTS:
        folder = source / f"{name} Cases"
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder: give the one that has {', '.join(f'{n} Cases' for n in COVID_COUNTS)}")
        rows[name] = []
        for patient in sorted(p for p in folder.iterdir() if p.is_dir()):
            target = volumes / f"{patient.name}.nii.gz"
            if not target.exists():
                write_volume(patient, target)
            rows[name].append({"case": patient.name, "patient": patient.name, "image": target, "label": name})
    return rows


def write_volume(patient: Path, target: Path) -> None:
    """A series of DICOM slices as a NIfTI file in Hounsfield units (int16). Written aside and renamed."""
    slices = dicom_files(patient)
    if not slices:
        raise BadInput(f"{patient}: no DICOM files: complete the data")
    image = open_series(slices[0])
    aside = target.with_name(f".{target.name}.tmp.nii.gz")
    nib.save(nib.Nifti1Image(image.read(0).round().astype("int16"), image.affine), aside)
    aside.replace(target)


def make(name: str, source: Path, output_dir: Path, seed: int, table: Path | None) -> tuple[Path, list[int]]:
    """Write the list of a set; returns its path and the cases of each part.

    Raises:
        BadInput: The data is not the published set.
    """
    if not source.is_dir():
        raise BadInput(f"{source}: no such folder")
    if name == "ICBM":
        if table is None:
            raise BadInput("ICBM needs --table, the CSV of its scans that LONI's archive gives")
        rows = icbm(source, table)
        if len({row["patient"] for row in rows}) < len(SPLITS):
            raise BadInput(f"{source}: scans of fewer than three people of 20 to 60: give the whole set")
        parts = split_scans(rows, ICBM_COUNTS, seed)
    else:
        parts = {split: [] for split in SPLITS}
        for label, of_class in covid_ct_md(source, output_dir / "volumes").items():
            counts = COVID_COUNTS[label]
            if len(of_class) != sum(counts):
                raise BadInput(f"{source / f'{label} Cases'}: {len(of_class)} patients, the paper has {sum(counts)}")
            for split, chosen in split_patients(of_class, counts, seed).items():
                parts[split] += chosen
    path = output_dir / f"{name}_cls_datalist.json"
    write_downstream_datalist(path, parts, seed)
    return path, [len(parts[split]) for split in SPLITS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["ICBM", "COVID-CT-MD"])
    parser.add_argument("source", type=Path, help="the publisher's folder")
    parser.add_argument("--output-dir", type=Path, help="folder of the list and of volumes; default: the publisher's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="CSV of ICBM's scans")
    args = parser.parse_args()
    try:
        path, counts = make(args.dataset, args.source, args.output_dir or args.source, args.seed, args.table)
    except BadInput as err:
        print(err, file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"{path}: {'/'.join(map(str, counts))} training, validation and test scans")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
