"""The loader of a training run: batches from a step on, the same for any number of workers."""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from itertools import islice
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from dinov2.data.augmentations import DataAugmentationDINO3d
from dinov2.data.cache.folder import VolumeCache
from dinov2.data.collate import Batch, BatchLayout, Masking, collate
from dinov2.data.datalist import Datalist
from dinov2.data.dataset import PretrainDataset, Sample
from dinov2.data.samplers import PositionSampler
from dinov2.data.slots import HELD, slot_queue
from dinov2.data.swin_views import NUM_VIEWS, SwinViews
from dinov2.data.workers import one_thread
from dinov2.distributed.precision import crop_dtype
from dinov2.errors import BadInput, replaced

logger = logging.getLogger(__name__)


VOXEL_BYTES = 2  # of a preprocessed volume
MIN_KEPT = 0.1  # share of the list that a process must be able to keep

Take = Callable[[bool], Batch | None]  # the next batch; with False, None where it would have to be waited for


def build_augmentation(cfg: DictConfig) -> DataAugmentationDINO3d:
    """The augmentation of a configuration's `crops`, with the back end of `train.augmentation`."""
    return DataAugmentationDINO3d(**cfg.crops, backend=cfg.train.augmentation)


class TrainLoader:
    """Iterates over steps: each item is the list of this rank's micro-batches.

    Args:
        cfg: A merged configuration.
        datalist: The volumes, already filtered.
        start_step: First step to deliver.
        rank, world_size: This rank's share.
        device: Where batches go; to CUDA one ahead, read by the device from where loader processes wrote them.

    A batch stays as it is while anything refers to it. On the CPU the newest two are views of memory shared with the loader
    processes, and whoever keeps more is given copies.

    Iteration raises `BadInput` where no volume of the list can be used, or a loader process was killed.
    Volumes that were replaced are named in the log once each and counted in `bad_volumes`.
    """

    def __init__(
        self,
        cfg: DictConfig,
        datalist: Datalist,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        t = cfg.train
        self.device = torch.device(device)
        self.datalist = datalist = _turned(datalist, t.orientation)
        self.accumulation_steps = t.accumulation_steps
        self.bad_volumes: dict[str, str] = {}
        self._sampler = sampler = PositionSampler(t.batch_size_per_gpu, t.accumulation_steps, rank, world_size, start_step)
        self._layout = _layout(cfg, crop_dtype(cfg, self.device.type))
        masked = cfg.ibot.mask_sample_probability if t.objective == "3dino" else 0.0
        self._masking = Masking(t.seed, sampler.effective_batch, masked, tuple(cfg.ibot.mask_ratio_min_max))
        cache = VolumeCache(t.cache_dir, t.cache_max_gb) if t.cache_dir else None
        self.batch_size = t.batch_size_per_gpu
        self.num_workers = count_workers(t.num_workers, len(os.sched_getaffinity(0)))
        store_bytes = store_share(t.memory_store_mb * 2**20, self.num_workers, datalist)
        self.dataset = _dataset(cfg, datalist, sampler.effective_batch, store_bytes, cache)

    def __iter__(self) -> Generator[list[Batch], None, None]:
        if self._sampler.rank == 0:
            logger.info("%s", load_line(os.getloadavg()[0], len(os.sched_getaffinity(0)), self.num_workers))
        with self._batches() as take:
            on_cuda = self.device.type == "cuda"
            batches = one_ahead(take, CudaCopies(self.device)) if on_cuda else iter(lambda: take(True), None)
            while True:
                yield list(islice(batches, self.accumulation_steps))

    def drawn_here(self) -> Iterator[Sample]:
        """Volumes in their order, one by one and by this process, their crops into the same memory; for timing it."""
        memory = np.empty(self._layout.nbytes, np.uint8)
        crops = self._layout.rows(memory).crops_of(0)
        for positions in self._sampler:
            for position in positions:
                yield self.dataset.draw(position, crops)

    @contextmanager
    def _batches(self) -> Iterator[Take]:
        """What delivers batches in host memory, in order."""
        positions, layout = iter(self._sampler), self._layout
        if self.num_workers == 0:
            yield lambda wait: self._alone(next(positions)) if wait else None
            return
        with slot_queue(self._write, layout.nbytes, positions, layout.batch_size, self.num_workers, self.device) as queue:
            yield lambda wait: self._batch(*taken) if (taken := queue.take(wait)) else None

    def _alone(self, positions: Sequence[int]) -> Batch:
        memory = np.empty(self._layout.nbytes, np.uint8)
        with one_thread():
            written = [self._write(memory, positions, range(len(positions)))]
        return self._batch(memory, positions, written)

    def _write(self, memory: np.ndarray, positions: Sequence[int], volumes: Sequence[int]) -> tuple[dict[int, Sample], int]:
        """Fill the rows of some volumes of a batch; who has the first one fills the masks."""
        rows = self._layout.rows(memory)
        samples = {volume: self.dataset.draw(positions[volume], rows.crops_of(volume)) for volume in volumes}
        return samples, self._masking.write(positions, rows.masks) if 0 in samples else 0

    def _batch(self, memory: np.ndarray, positions: Sequence[int], written: list[tuple[dict[int, Sample], int]]) -> Batch:
        samples = {volume: sample for part, _ in written for volume, sample in part.items()}
        upperbound = sum(bound for _, bound in written)
        in_order = [samples[volume] for volume in range(len(positions))]
        batch = collate(self._layout.rows(memory), positions, in_order, upperbound)
        self._report(batch)
        return batch

    def _report(self, batch: Batch) -> None:
        for path, reason in batch["bad"].items():
            if path not in self.bad_volumes:
                self.bad_volumes[path] = reason
                logger.warning("unusable volume %d, replaced: %s", len(self.bad_volumes), reason)
        if "positions" not in batch:
            reason = next(iter(batch["bad"].values()))
            raise BadInput(f"{self.datalist.path}: none of its {len(self.datalist)} volumes can be used; the first: {reason}")


def count_workers(asked: int, num_cores: int) -> int:
    """Loader processes of this rank; for -1 its share of the machine's cores, less the one that training runs on."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return asked if asked >= 0 else max(1, num_cores // ranks - 1)


def store_share(rank_bytes: int, num_workers: int, datalist: Datalist) -> int:
    """What each loader process of a rank may keep of preprocessed volumes: its share, or 0 where that is of no use.

    Volumes come to processes at random, so a process finds a volume kept about as often as its share is of the whole list.
    """
    share = rank_bytes // max(1, num_workers)
    of_list = share / sum(VOXEL_BYTES * math.prod(entry.shape) for entry in datalist.entries)
    if of_list >= MIN_KEPT:
        return share
    if rank_bytes:
        what = (
            "train.memory_store_mb: %.0f MiB for each of %d loader processes is %.1f %% of the list: nothing is kept in memory"
        )
        logger.info(what, share / 2**20, max(1, num_workers), 100 * of_list)
    return 0


def load_line(load: float, num_cores: int, num_workers: int) -> str:
    """What the machine is busy with before the loader starts, and what that means."""
    line = f"load of this machine {load:.1f} on {num_cores} cores, {num_workers} loader processes to start"
    if load < num_cores / 2:
        return line
    return f"{line}: other programs use them, steps will take longer; least so with few train.num_threads"


def _turned(datalist: Datalist, orientation: str) -> Datalist:
    """The list with volumes whose axes point as `train.orientation` says."""
    if not orientation:
        return datalist
    return replace(datalist, entries=[replace(entry, orientation=orientation) for entry in datalist.entries])


def _dataset(
    cfg: DictConfig, datalist: Datalist, effective_batch: int, store_bytes: int, cache: VolumeCache | None
) -> PretrainDataset | SwinViews:
    """What an objective learns from, by position."""
    shared = cfg.train.seed, store_bytes, cache
    if cfg.train.objective == "swin":
        return SwinViews(datalist, cfg.crops.global_crops_size, cfg.swin.max_corrupted, effective_batch, *shared)
    return PretrainDataset(datalist, build_augmentation(cfg), *shared)


def _layout(cfg: DictConfig, dtype: torch.dtype) -> BatchLayout:
    """Of `SwinViews`, what the network sees of the views lies where local crops do."""
    c, num_patches = cfg.crops, (cfg.crops.global_crops_size // cfg.student.patch_size) ** 3
    sizes = c.global_crops_size, c.local_crops_size, c.local_crops_number
    if cfg.train.objective == "swin":
        sizes = c.global_crops_size, c.global_crops_size, NUM_VIEWS
    return BatchLayout(cfg.train.batch_size_per_gpu, *sizes, num_patches, dtype)


class CudaCopies:
    """Batches on their way to a CUDA device, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._sources: deque[tuple[Batch, Any]] = deque()  # what is read, and the event of its end

    def start(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """The batch on the device, and the event that its values are there."""
        with torch.cuda.stream(self._stream):  # slots are pinned memory; of what is not, a pinned copy is read
            tensors = {key: value for key, value in batch.items() if torch.is_tensor(value)}
            moved = batch | {key: value.pin_memory().to(self.device, non_blocking=True) for key, value in tensors.items()}
            copied = self._stream.record_event()
        self._sources.append((batch, copied))
        return moved, copied

    def arrived(self, batch: Batch, copied: torch.cuda.Event) -> Batch:
        """The batch for use on the current stream, its memory kept until that stream is done with it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for value in batch.values():
            if torch.is_tensor(value):
                value.record_stream(current)
        return batch

    def release(self) -> None:
        """Let go of host memory that has been read; wait where `HELD` batches have not been."""
        while self._sources and (len(self._sources) >= HELD or self._sources[0][1].query()):
            self._sources.popleft()[1].synchronize()


def one_ahead(take: Take, copies: CudaCopies) -> Iterator[Batch]:
    """Batches on a device, each copied while the one before is computed with, where it is there in time."""

    def start(wait: bool) -> tuple[Batch, torch.cuda.Event] | None:
        copies.release()
        batch = take(wait)
        return None if batch is None else copies.start(batch)

    waiting = start(True)
    while waiting is not None:  # always: it was waited for
        ahead = start(False)
        yield copies.arrived(*waiting)
        waiting = ahead or start(True)


class SamplerType(Enum):
    """DINOv2's, so that scripts that name one load; every run here has one endless order (`samplers.py`)."""

    DISTRIBUTED = 0
    EPOCH = 1
    INFINITE = 2
    SHARDED_INFINITE = 3
    SHARDED_INFINITE_NEW = 4


make_data_loader = replaced(
    "dinov2.data.make_data_loader",
    "dinov2.data.TrainLoader(cfg, datalist), or torch's DataLoader with dinov2.data.collate_data_and_cast",
)
make_dataset_3d = replaced(
    "dinov2.data.make_dataset_3d",
    "dinov2.data.read_datalist(path).larger_than(min_axis) with dinov2.data.TrainLoader(cfg, datalist)",
)
make_segmentation_dataset_3d = replaced(
    "dinov2.data.loaders.make_segmentation_dataset_3d",
    "dinov2.data.downstream: recipes.load_recipe, lists.read_downstream_datalist and cases.Cases",
)
