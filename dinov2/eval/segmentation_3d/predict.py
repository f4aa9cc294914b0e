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
from dinov2.data.volumes.dicom import first_slices
from dinov2.data.volumes.formats import FORMAT_NAMES, is_scan_path, scans_in, stem
from dinov2.distributed.precision import evaluation_dtype
from dinov2.distributed.runtime import start_runtime
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, BadInput
from dinov2.eval.segmentation_3d.build import load_segmentation
from dinov2.eval.segmentation_3d.inference import predict_masks
from dinov2.files import replacing

logger = logging.getLogger(__name__)


def predict(weights: str | Path, inputs: Sequence[Path], output: Path, overlap: float, say: Callable[[str], None]) -> int:
    """Segment one case into a file, or every scan of a folder into a folder.

    A scan is a file or the folder of a DICOM series, whatever is asked for.

    Args:
        weights: `best_model.pth` of segmentation3d.py.
        inputs: The channels of one case, in the recipe's order; or one folder of single-channel scans.
        output: A NIfTI file for one case; a folder for a folder of scans. Written aside and renamed.
        overlap: Of the sliding window.
        say: Where the results are announced.

    Returns:
        The exit code; a scan of a folder that cannot be used is named, and the others are segmented.

    Raises:
        BadInput: Weights or files that cannot be used.
    """
    runtime = start_runtime()
    model, cfg, task = load_segmentation(weights, runtime)
    dtype = evaluation_dtype(cfg, runtime.device.type)
    jobs = plan_jobs(inputs, output, task.recipe)
    failed = 0
    for item, target in jobs:
        try:
            case = prepare_case(item, task.recipe, task.resize_scale)
        except BadInput as err:
            if len(jobs) == 1:
                raise
            failed += 1
            logger.error("%s", err)
            continue
        masks = predict_masks(model, case, task.recipe, task.image_size, overlap, cfg.segmentation.window_batch, dtype)
        _write(restore_prediction(task.recipe.compose(masks), case), target)
        say(f"{target}: " + _volumes(masks, case, task.recipe))
    if failed:
        logger.error("%d of %d scans could not be used; they are named above", failed, len(jobs))
    return EXIT_BAD_INPUT if failed else EXIT_OK


def plan_jobs(inputs: Sequence[Path], output: Path, recipe: Recipe) -> list[tuple[Item, Path]]:
    """Every case to segment and the file of its result; all checked before the first is begun.

    Raises:
        BadInput: Nothing to segment, two cases with one result, or a result in place of an input.
    """
    is_one_case = output.name.lower().endswith((".nii", ".nii.gz"))
    if len(inputs) == 1 and inputs[0].is_dir() and not is_one_case:
        jobs = [(Item((str(p),), None, stem(p)), output / f"{stem(p)}.nii.gz") for p in _scans(inputs[0], recipe)]
    else:
        for path in inputs:
            if not is_scan_path(path):
                what = "a folder without DICOM files is no case: as a folder of scans it needs a folder as --output"
                raise BadInput(f"--input {path}: {what if path.is_dir() else 'no such file or DICOM folder'}")
        if not is_one_case:
            raise BadInput(f"--output {output}: must end in .nii.gz")
        jobs = [(Item(tuple(map(str, inputs)), None, stem(inputs[0])), output)]
    source_of: dict[Path, str] = {}
    for item, target in jobs:
        if target in source_of:
            first, second = (Path(p).name for p in (source_of[target], item.images[0]))
            raise BadInput(f"--input {inputs[0]}: {first} and {second} would both become {target.name}: rename one of them")
        source_of[target] = item.images[0]
    written = {target.resolve(): target for target in source_of}
    for path in (Path(p) for item, _ in jobs for p in item.images):
        if path.resolve() in written:
            raise BadInput(f"--output {written[path.resolve()]}: would replace the input {path}: choose another place")
    return jobs


def _scans(folder: Path, recipe: Recipe) -> list[Path]:
    """The single-channel scans of a folder: files, folders of DICOM series, the first slice of each series in itself."""
    if recipe.channels > 1:
        raise BadInput(f"--input {folder}: {recipe.name} has {recipe.channels} channels: give the files of one case")
    try:
        found = sorted([*scans_in(folder), *first_slices(folder)])
    except OSError as err:
        raise BadInput(f"--input {folder}: {err.filename or folder} cannot be read: {err.strerror}") from err
    if not found:
        raise BadInput(f"--input {folder}: no {FORMAT_NAMES} file in it")
    return found


def _volumes(masks: Tensor, case: Case, recipe: Recipe) -> str:
    """What was found, in millilitres of the prepared grid; without the background."""
    ml = masks.flatten(1).sum(1) * math.prod(case.spacing_mm) / 1000
    first = 0 if recipe.overlapping else 1
    return ", ".join(f"{n} {v:.1f} ml" for n, v in zip(recipe.output_names[first:], ml[first:].tolist(), strict=True))


def _write(image: nib.Nifti1Image, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            nib.save(image, temporary)
    except OSError as err:
        raise BadInput(f"--output {target}: cannot be written ({err.strerror or err}): choose another place") from err
