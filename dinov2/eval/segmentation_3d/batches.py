"""Training batches of crops: a function of (seed, position), for any number of loader processes and ranks."""

from __future__ import annotations

import logging
from collections.abc import Generator

import torch
from torch import Tensor

from dinov2.data.downstream.cases import Cases
from dinov2.data.downstream.crops import is_smaller, training_crops
from dinov2.data.samplers import EndlessOrder, PositionSampler
from dinov2.data.workers import compute_in_order
from dinov2.distributed.runtime import Runtime
from dinov2.geometry import Edges
from dinov2.logging.progress import track
from dinov2.streams import Kind, stream

logger = logging.getLogger(__name__)


class CropBatches:
    """Iterates over steps.

    Args:
        cases: Of the training part.
        image_size: Edges of the crops.
        batch_size: Cases of this rank a step.
        seed: Of order and crops.
        start_step: First step to deliver.
        num_workers: Loader processes.
        runtime: Rank and device.
    """

    def __init__(
        self,
        cases: Cases,
        image_size: Edges,
        batch_size: int,
        seed: int,
        start_step: int,
        num_workers: int,
        runtime: Runtime,
    ) -> None:
        self.cases = cases
        self.image_size = image_size
        self.seed = seed
        self.num_workers = num_workers
        self.device = runtime.device
        self.order = EndlessOrder(len(cases), seed)
        self.sampler = PositionSampler(batch_size, 1, runtime.rank, runtime.world_size, start_step)

    def __iter__(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """`images` [n, C, *s] float32 and `labels` [n, 1, *s] int64, n = cases x crops of each."""
        for images, labels in compute_in_order(self._compute, self.sampler, self.num_workers):
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True).long()

    def _compute(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        crops = []
        for position in positions:
            case = self.cases[self.order(position)]
            rng = stream(self.seed, Kind.SAMPLE, position)
            crops += training_crops(case, self.cases.recipe, self.image_size, rng)
        return torch.stack([c["image"] for c in crops]), torch.stack([c["label"] for c in crops])


def prepare_all(cases: Cases, image_size: Edges, part: str, runtime: Runtime) -> None:
    """Read every case of this rank's share once: what is wrong with one is said before the first iteration, not hours later.

    It also fills the cache. Cases that are smaller than a window are counted and said once.

    Raises:
        BadInput: A case cannot be prepared.
    """
    small = []
    for index in track(range(runtime.rank, len(cases), runtime.world_size), f"{part} cases prepared"):
        case = cases[index]
        if is_smaller(case, image_size):
            small.append(case.name)
    if small:
        shown = image_size if isinstance(image_size, int) else " x ".join(map(str, image_size))
        what = "%d of %d %s cases are smaller than the window of %s voxels (%s, ...): padded, predictions are cropped back"
        logger.info(what, len(small), len(cases), part, shown, small[0])
