"""Write <dataset>_100_datalist.json for one of the paper's segmentation sets, as it comes from its publisher.

    python scripts/datasets/datalist.py BTCV RawData
    python scripts/datasets/datalist.py BraTS RSNA_ASNR_MICCAI_BraTS2021_TrainingData --name-mapping BraTS21-17_Mapping.csv
    python scripts/datasets/datalist.py LA-SEG "Atrial Segmentation Challenge"
    python scripts/datasets/datalist.py TDSC-ABUS TDSC-ABUS2023

Cases are dealt out to training, validation and test at random by --seed, with the paper's counts; the training list is
shuffled by the same seed, so that its first n cases are a random subset. The list lies in the data's folder or in
--output-dir, which is the --base-data-dir of the evaluation. Another number of cases than the paper's is refused;
`dinov2 split` takes any.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dinov2.data.downstream.lists import write_downstream_datalist
from dinov2.data.downstream.split import Row, split_patients
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, BadInput

BRATS_CHANNELS = ("flair", "t1", "t1ce", "t2")


def btcv(source: Path) -> list[Row]:
    """`Training/img/img0001.nii.gz` and `Training/label/label0001.nii.gz`."""
    rows = []
    for image in sorted(source.rglob("img/img*.nii.gz")):
        label = image.parent.parent / "label" / image.name.replace("img", "label")
        if label.exists():  # the challenge's own test scans have none
            rows.append({"case": image.name.removesuffix(".nii.gz"), "image": image, "label": label})
    return rows


def brats(source: Path) -> list[Row]:
    """`BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz`."""
    rows = []
    for label in sorted(source.rglob("BraTS2021_*_seg.nii.gz")):
        case = label.name.removesuffix("_seg.nii.gz")
        images = {f"image{i + 1}": label.with_name(f"{case}_{c}.nii.gz") for i, c in enumerate(BRATS_CHANNELS)}
        rows.append({"case": case, **images, "label": label})
    return rows


def la_seg(source: Path) -> list[Row]:
    """`Training Set/<id>/{lgemri,laendo}.nrrd` and the same under `Testing Set`."""
    rows = []
    for image in sorted(source.rglob("lgemri.nrrd")):
        part = "test" if image.parent.parent.name.lower().startswith("test") else "training"
        rows.append({"case": image.parent.name, "image": image, "label": image.with_name("laendo.nrrd"), "part": part})
    return rows


def tdsc_abus(source: Path) -> list[Row]:
    """`Train/DATA/DATA_000.nrrd` and `Train/MASK/MASK_000.nrrd`."""
    return [
        {
            "case": image.name.removesuffix(".nrrd"),
            "image": image,
            "label": image.parents[1] / "MASK" / image.name.replace("DATA", "MASK"),
        }
        for image in sorted(source.rglob("Train/DATA/DATA_*.nrrd"))
    ]


class Published(NamedTuple):
    """A set's layout and the paper's counts."""

    find: Callable[[Path], list[Row]]
    counts: tuple[int, int, int]  # training, validation, test
    fixed_test: bool = False  # the publisher's own test part


SETS = {
    "BTCV": Published(btcv, (20, 4, 6)),
    "BraTS": Published(brats, (758, 108, 218)),
    "LA-SEG": Published(la_seg, (80, 20, 54), fixed_test=True),
    "TDSC-ABUS": Published(tdsc_abus, (70, 10, 20)),
}


def tcga_cases(mapping: Path) -> set[str]:
    """Names in the rows of the name mapping that speak of TCGA (its collections, or its patients), whatever the columns.

    Raises:
        BadInput: Unreadable, or without any.
    """
    try:
        with mapping.open(encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise BadInput(f"--name-mapping {mapping}: cannot be read: {err}") from err
    found = {cell for row in rows if any("TCGA" in cell.upper() for cell in row) for cell in row}
    if not found:
        raise BadInput(f"--name-mapping {mapping}: no row names TCGA: take the mapping that comes with BraTS 2021")
    return found


def make(name: str, source: Path, output_dir: Path, seed: int, mapping: Path | None) -> Path:
    """Write the list of a set; returns its path.

    Raises:
        BadInput: The data is not the published set, whole.
    """
    published = SETS[name]
    if not source.is_dir():
        raise BadInput(f"{source}: no such folder")
    rows = published.find(source)
    if name == "BraTS":
        if mapping is None:
            raise BadInput("BraTS needs --name-mapping, the CSV that comes with it: the paper leaves out the cases of TCGA")
        excluded = tcga_cases(mapping)
        rows = [row for row in rows if row["case"] not in excluded]
    for row in rows:
        for path in (v for v in row.values() if isinstance(v, Path)):
            if not path.exists():
                raise BadInput(f"{row['case']}: no such file {path}: complete the data")
    if len(rows) != sum(published.counts):
        layout = published.find.__doc__
        raise BadInput(
            f"{source}: {len(rows)} cases, the paper has {sum(published.counts)}; expected {layout} `dinov2 split` takes any"
        )
    splits = deal_out(rows, published, seed, source)
    path = output_dir / f"{name}_100_datalist.json"
    write_downstream_datalist(path, splits, seed)
    return path


def deal_out(rows: list[Row], published: Published, seed: int, source: Path) -> dict[str, list[Row]]:
    """Rows by part, the publisher's own test part where it is kept."""
    own_test = [row for row in rows if row.pop("part", None) == "test"]
    if not published.fixed_test:
        return split_patients(rows, published.counts, seed)
    training, validation, test = published.counts
    if len(own_test) != test:
        raise BadInput(f"{source}: {len(own_test)} cases below a folder whose name begins with Test, the paper has {test}")
    rest = [row for row in rows if row not in own_test]
    return {**split_patients(rest, (training, validation, 0), seed), "test": own_test}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=list(SETS))
    parser.add_argument("source", type=Path, help="the publisher's folder")
    parser.add_argument("--output-dir", type=Path, help="folder of the list; default: the publisher's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name-mapping", type=Path, help="CSV that tells which BraTS case is of TCGA")
    args = parser.parse_args()
    try:
        path = make(args.dataset, args.source, args.output_dir or args.source, args.seed, args.name_mapping)
    except BadInput as err:
        print(err, file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"{path}: {'/'.join(map(str, SETS[args.dataset].counts))} training, validation and test cases")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
