"""Whole volumes by a sliding window, and their scores."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor, nn

from dinov2.data.downstream.cases import Case, Cases
from dinov2.data.downstream.crops import BACKGROUND
from dinov2.data.downstream.recipes import IGNORED, Recipe
from dinov2.distributed import gather_objects
from dinov2.distributed.precision import autocast
from dinov2.distributed.runtime import Runtime
from dinov2.eval.metrics.segmentation import Score, score_case
from dinov2.geometry import Edges, edges
from dinov2.logging.progress import track

logger = logging.getLogger(__name__)

TEST_OVERLAP, VALIDATION_OVERLAP = 0.75, 0.0


@torch.inference_mode()
def predict_masks(
    model: nn.Module, case: Case, recipe: Recipe, image_size: Edges, overlap: float, window_batch: int, dtype: torch.dtype
) -> Tensor:
    """One mask per output of a whole case.

    Windows go to the device in batches; the sum over them stays in main memory, so that a large volume needs no more of the
    device than a small one.

    Args:
        model: In evaluation mode.
        case: Smaller ones than a window are padded with the lowest intensity, and cropped back.
        recipe: Its outputs.
        image_size: Edges of a window (voxels).
        overlap: Share of a window that the next one covers too.
        window_batch: Windows a pass.
        dtype: Of the multiplications on a GPU.

    Returns:
        [R, H, W, D] bool on the CPU.
    """
    from monai.inferers import sliding_window_inference

    device = next(model.parameters()).device

    def logits_of(windows: Tensor) -> Tensor:
        with autocast(device.type, dtype):
            return model(windows).float()

    logits = sliding_window_inference(
        case.image[None],
        edges(image_size),
        window_batch,
        logits_of,
        overlap=overlap,
        cval=BACKGROUND,
        sw_device=device,
        device=torch.device("cpu"),
    )[0]  # [R, H, W, D]
    return masks_of(logits, recipe)


def masks_of(logits: Tensor, recipe: Recipe) -> Tensor:
    """One mask per output, [R, H, W, D] -> the same, bool: overlapping regions each alone, of classes the likeliest."""
    if recipe.overlapping:
        return logits > 0
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(0, logits.argmax(0, keepdim=True), True)


def score_cases(
    model: nn.Module,
    cases: Cases,
    image_size: Edges,
    overlap: float,
    window_batch: int,
    dtype: torch.dtype,
    runtime: Runtime,
    surfaces: bool,
) -> tuple[list[Score], float]:
    """Scores of all cases, shared out over the ranks, in the cases' order; and seconds a case."""
    recipe, start, own = cases.recipe, time.perf_counter(), []
    mine = range(runtime.rank, len(cases), runtime.world_size)
    model.eval()
    for index in track(mine, "cases"):
        case = cases[index]
        masks = predict_masks(model, case, recipe, image_size, overlap, window_batch, dtype) & (case.truth != IGNORED)
        target, tolerance = recipe.masks(case.truth), recipe.metrics.nsd_tolerance_mm
        own.append((index, score_case(case.name, masks, target, case.spacing_mm, recipe.output_names, tolerance, surfaces)))
    seconds = (time.perf_counter() - start) / max(1, len(mine))
    gathered: Sequence[tuple[int, list[Score]]] = sorted(
        (p for of_rank in gather_objects(own) for p in of_rank), key=itemgetter(0)
    )
    return [score for _, scores in gathered for score in scores], seconds
