"""`dinov2 predict`: label maps of scans by a trained segmentation, each on its file's own grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
from torch import Tensor

from dinov2.data.downstream.cases import Case, prepare_case, restore_prediction
from dinov2.data.downstream.lists import Item
from dinov2.data.downstream.recipes import Recipe
from dinov2.data.downstream.split import CHANNEL
from dinov2.data.volumes.dicom import first_slices
from dinov2.data.volumes.formats import FORMAT_NAMES, is_scan_path, scans_in, stem
from dinov2.data.volumes.opening import open_image
from dinov2.distributed.precision import evaluation_dtype
from dinov2.distributed.runtime import start_runtime
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, BadInput, BadVolume
from dinov2.eval.segmentation_3d.build import load_segmentation
from dinov2.eval.segmentation_3d.inference import predict_masks
from dinov2.files import refuse_output, replacing, user_path
from dinov2.logging.progress import track

logger = logging.getLogger(__name__)


def predict(
    weights: str | Path,
    inputs: Sequence[Path],
    output: Path,
    overlap: float,
    say: Callable[[str], None],
    encoder: str | None = None,
) -> int:
    """Segment one case into a file, or every case of a folder into a folder.

    A scan is a file or the folder of a DICOM series, whatever is asked for.

    Args:
        weights: `best_model.pth` of segmentation3d.py.
        inputs: The channels of one case, in the recipe's order; or one folder of cases (`cases_of`).
        output: A NIfTI file for one case; a folder for a folder of cases. Written aside and renamed.
        overlap: Of the sliding window.
        say: Where the results are announced.
        encoder: `module:function`, of a network around somebody's encoder.

    Returns:
        The exit code; a case of a folder that cannot be used is named, and the others are segmented.

    Raises:
        BadInput: Weights or files that cannot be used.
    """
    runtime = start_runtime()
    model, cfg, task = load_segmentation(weights, runtime, encoder)
    dtype = evaluation_dtype(cfg, runtime.device.type)
    jobs = plan_jobs(inputs, output, task.recipe)
    failed = 0
    for item, target in track(jobs, "cases", has_bar=False):  # `say` is heard on the terminal
        try:
            case = prepare_case(item, task.recipe, task.resize_scale)
        except BadInput as err:
            if len(jobs) == 1:
                raise
            failed += 1
            logger.error("%s", err)
            continue
        masks = predict_masks(model, case, task.recipe, task.image_size, overlap, cfg.segmentation.window_batch, dtype)
        write_label_map(restore_prediction(task.recipe.compose(masks), case), target)
        say(f"{target}: " + _volumes(masks, case, task.recipe))
    if failed:
        logger.error("%d of %d cases could not be used; they are named above", failed, len(jobs))
    return EXIT_BAD_INPUT if failed else EXIT_OK


def plan_jobs(inputs: Sequence[Path], output: Path, recipe: Recipe) -> list[tuple[Item, Path]]:
    """Every case to segment and the file of its result; all checked before the first is begun.

    Raises:
        BadInput: Nothing to segment, two cases with one result, or a result in place of an input.
    """
    is_one_case = output.name.lower().endswith((".nii", ".nii.gz"))
    if len(inputs) == 1 and inputs[0].is_dir() and not is_one_case:
        cases = cases_of(inputs[0], recipe)
        jobs = [(Item(tuple(map(str, scans)), None, name), output / f"{name}.nii.gz") for name, scans in cases]
    else:
        for path in inputs:
            if not is_scan_path(path):
                what = "a folder without DICOM files is no case: as a folder of cases it needs a folder as --output"
                raise BadInput(f"--input {path}: {what if path.is_dir() else 'no such file or DICOM folder'}")
        if not is_one_case:
            raise BadInput(f"--output {output}: must end in .nii.gz")
        jobs = [(Item(tuple(map(str, inputs)), None, stem(inputs[0])), output)]
    if not is_one_case and output.exists() and not output.is_dir():
        raise BadInput(f"--output {output}: is a file: for a folder of cases give a folder")
    source_of: dict[Path, str] = {}
    for item, target in jobs:
        refuse_output(target, "--output")
        if target in source_of:
            first, second = (Path(p).name for p in (source_of[target], item.images[0]))
            raise BadInput(f"--input {inputs[0]}: {first} and {second} would both become {target.name}: rename one of them")
        source_of[target] = item.images[0]
    written = {target.resolve(): target for target in source_of}
    for path in (Path(p) for item, _ in jobs for p in item.images):
        if path.resolve() in written:
            raise BadInput(f"--output {written[path.resolve()]}: would replace the input {path}: choose another place")
    return jobs


def cases_of(folder: Path, recipe: Recipe) -> list[tuple[str, list[Path]]]:
    """Name and scans of every case of a folder, in the order of the scans' names.

    As in nnU-Net's imagesTs, CASE_0000, CASE_0001, ... are the channels of CASE. Any other scan is a case of its own, which
    holds all channels: a file, the folder of a DICOM series, the first slice of a series in the folder itself.

    Raises:
        BadInput: Nothing in it, or a case without all of its channels or with others.
    """
    try:
        scans, series = scans_in(folder), first_slices(folder)
    except OSError as err:
        raise BadInput(f"--input {folder}: {err.filename or folder} cannot be read: {err.strerror}") from err
    for path in (*scans, *series):
        user_path(path)  # refuses a name that is not text
    if not scans and not series:
        raise BadInput(f"--input {folder}: no {FORMAT_NAMES} file in it")
    numbered: dict[str, list[tuple[int, Path]]] = {}
    alone = list(series)  # slices are numbered too, which means nothing here
    for path in scans:
        found = CHANNEL.search(stem(path))
        if found is None or found.start() == 0:
            alone.append(path)
        else:
            numbered.setdefault(stem(path)[: found.start()], []).append((int(found[1]), path))
    cases = []
    for name, channels in numbered.items():
        if _are_channels([c for c, _ in channels], recipe.channels):
            cases.append((name, _whole(folder, name, channels, recipe)))
        else:  # scans that are numbered
            alone += [path for _, path in channels]
    if recipe.channels > 1:
        _check_channels(folder, alone, recipe)
    return sorted([*cases, *((stem(path), [path]) for path in alone)], key=lambda case: case[1][0])


def _are_channels(numbers: list[int], num_channels: int) -> bool:
    """Whether the numbers that end the names of some scans are meant as channels."""
    return numbers == [0] if num_channels == 1 else min(numbers) < num_channels


def _whole(folder: Path, name: str, channels: list[tuple[int, Path]], recipe: Recipe) -> list[Path]:
    """The scans of a case's channels, in order as they came, each of which must be there once."""
    numbers = [c for c, _ in channels]
    missing = sorted(set(range(recipe.channels)) - set(numbers))
    if missing:
        file = f"{name}_{missing[0]:04}"
        raise BadInput(f"--input {folder}: {name} has no {file}, and {recipe.name} has {recipe.channels} channels: complete it")
    extra = [path.name for i, (c, path) in enumerate(channels) if c != i or i >= recipe.channels]
    if extra:
        raise BadInput(f"--input {folder}: {extra[0]} is one file too many: {recipe.name} has {recipe.channels} channels")
    return [path for _, path in channels]


def _check_channels(folder: Path, alone: Sequence[Path], recipe: Recipe) -> None:
    """Every scan that stands for a case of several channels holds them, as far as it can be opened."""
    for path in alone:
        try:
            found = math.prod(open_image(str(path)).shape[3:])
        except BadVolume:  # named in its turn
            continue
        if found != recipe.channels:
            what = f"{path.name} holds {found} channels, {recipe.name} has {recipe.channels}"
            names = f"CASE_0000 to CASE_{recipe.channels - 1:04}"
            raise BadInput(f"--input {folder}: {what}: name a case's files {names}, or give them as --input of one case")


def _volumes(masks: Tensor, case: Case, recipe: Recipe) -> str:
    """What was found, in millilitres of the prepared grid; without the background."""
    ml = masks.flatten(1).sum(1) * math.prod(case.spacing_mm) / 1000
    first = 0 if recipe.overlapping else 1
    return ", ".join(f"{n} {v:.1f} ml" for n, v in zip(recipe.output_names[first:], ml[first:].tolist(), strict=True))


def write_label_map(image: nib.Nifti1Image, target: Path) -> None:
    """Write a result, whole or not at all.

    Raises:
        BadInput: It cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            nib.save(image, temporary)
    except OSError as err:
        raise BadInput(f"--output {target}: cannot be written ({err.strerror or err}): choose another place") from err
