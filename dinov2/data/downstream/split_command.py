"""`dinov2 split`: cases of folders, of an nnU-Net data set or of a table, dealt out to the parts of a downstream list."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from dinov2.data.downstream.lists import write_downstream_datalist
from dinov2.data.downstream.nnunet import read_nnunet, write_recipe
from dinov2.data.downstream.split import (
    Row,
    counts_of_fractions,
    find_pairs,
    read_parts,
    read_table,
    split_as_listed,
    split_patients,
)
from dinov2.data.downstream.stratify import fold_parts, stratified_parts
from dinov2.errors import EXIT_OK, BadInput
from dinov2.files import refuse_output
from dinov2.logging import Say

logger = logging.getLogger(__name__)

SUMMARY = (
    "Write a downstream datalist: seeded parts or folds of images and label maps, or of a table of images and labels. "
    "No patient is in two parts; a table's labels have the same shares in all."
)
FRACTIONS = (0.7, 0.1, 0.2)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dinov2 split", description=SUMMARY)
    add = parser.add_argument
    add("--images", type=Path, help="folder of images; nnU-Net's imagesTr too")
    add("--labels", type=Path, help="folder of label maps named as the images; labelsTr too")
    nnunet = (
        "instead of them: nnU-Net's raw folder (DatasetXXX_Name, with dataset.json); the recipe is written beside the list too"
    )
    add("--nnunet", type=Path, metavar="FOLDER", help=nnunet)
    add("--table", type=Path, metavar="CSV", help="instead of them: a table with an image and a label a line")
    for name, default in (("image", "image"), ("label", "label"), ("patient", None)):
        add(f"--{name}-column", default=default, help=f"of the table; default: {default or 'none'}")
    add("--output", type=Path, required=True, help="the list: <dataset>_100_datalist.json, for a table _cls_")
    add("--seed", type=int, default=0, help="of the split and of the training list's order")
    parts = ("TRAINING", "VALIDATION", "TEST")
    what = f"of the patients, of a table of its lines; default: {' '.join(map(str, FRACTIONS))}"
    add("--fractions", type=float, nargs=3, metavar=parts, help=what)
    folds = "instead: K lists fold0/LIST, fold1/LIST, ...; fold i is tested, the next one validates, the others train"
    add("--folds", type=int, metavar="K", help=folds)
    patient = "regular expression whose group is the patient in a file name; default: sub-... (BIDS), else a file is a patient"
    add("--patient", metavar="PATTERN", help=patient)
    add("--parts", type=Path, metavar="JSON", help="a fixed split: file names of training, validation and test")
    add("--parts-key", metavar="KEY", help="the key of that file below which they are")
    return parser


def main(argv: Sequence[str], say: Say) -> int:
    """Parse, split, write.

    Raises:
        BadInput: What is wrong, in one line.
    """
    return run(get_args_parser().parse_args(argv), say)


def run(args: argparse.Namespace, say: Say) -> int:
    if args.folds is not None and (args.fractions or args.parts):
        raise BadInput("--folds decides the parts: leave out --fractions and --parts")
    refuse_output(args.output, "--output")
    rows, recipe = read_rows(args)
    lists = lists_of_folds(rows, args) if args.folds is not None else {args.output: deal(rows, args)}
    if recipe is not None:
        say(f"{write_recipe(args.output, recipe)}: the recipe; see to its intensities and spacing before it is used")
    for path, parts in lists.items():
        write_downstream_datalist(path, parts, args.seed)
        say(f"{path}: " + ", ".join(f"{len(items)} {name}" for name, items in parts.items()))
    return EXIT_OK


def read_rows(args: argparse.Namespace) -> tuple[list[Row], str | None]:
    """The cases of the one source that is given, and the text of a recipe where it tells one."""
    folders = bool(args.images or args.labels)
    if folders + bool(args.nnunet) + bool(args.table) != 1 or (folders and not (args.images and args.labels)):
        raise BadInput("give --images and --labels, or --nnunet (segmentation), or --table (classification, regression)")
    if args.table:
        return read_table(args.table, args.image_column, args.label_column, args.patient_column), None
    if args.nnunet:
        return read_nnunet(args.nnunet, args.patient)
    return find_pairs(args.images, args.labels, args.patient), None


def deal(rows: Sequence[Row], args: argparse.Namespace) -> dict[str, list[Row]]:
    """The cases of each part."""
    if args.parts:
        return split_as_listed(rows, read_parts(args.parts, args.parts_key))
    fractions = args.fractions or FRACTIONS
    if args.table:
        return stratified_parts(rows, fractions, args.seed)
    return split_patients(rows, counts_of_fractions(len({row["patient"] for row in rows}), fractions), args.seed)


def lists_of_folds(rows: Sequence[Row], args: argparse.Namespace) -> dict[Path, dict[str, list[Row]]]:
    """The parts of each fold by its list: the list's name decides the data set, so that each has a folder of its own."""
    folds = fold_parts(rows, args.folds, args.seed, by_label=bool(args.table))
    earlier = path_of_fold(args.output, len(folds))
    if earlier.exists():
        logger.warning("%s is of an earlier split into more folds: remove it", earlier)
    return {path_of_fold(args.output, i): parts for i, parts in enumerate(folds)}


def path_of_fold(output: Path, fold: int) -> Path:
    """Its folder is the --base-data-dir of the fold's evaluation."""
    return output.parent / f"fold{fold}" / output.name
