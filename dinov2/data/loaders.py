"""The loader of a training run: batches from a step on, the same for any number of workers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice

import torch
from omegaconf import DictConfig

from dinov2.data.augmentations import DataAugmentationDINO3d
from dinov2.data.cache import VolumeCache
from dinov2.data.collate import Batch, Collate
from dinov2.data.datalist import Datalist
from dinov2.data.dataset import PretrainDataset
from dinov2.data.samplers import PositionSampler
from dinov2.data.workers import compute_in_order
from dinov2.errors import BadInput

logger = logging.getLogger(__name__)


def build_augmentation(cfg: DictConfig, dtype: torch.dtype = torch.float32) -> DataAugmentationDINO3d:
    """The augmentation of a configuration's `crops`, with the back end of `train.augmentation`."""
    return DataAugmentationDINO3d(**cfg.crops, backend=cfg.train.augmentation, dtype=dtype)


def crop_dtype(cfg: DictConfig, device: torch.device) -> torch.dtype:
    """What crops are handed over in: the precision that both backbones multiply in where it is another than float32.

    For a half precision the patch embedding would round them to it anyway; half the bytes pass through shared memory and to
    the device.
    """
    names = {cfg.compute_precision[side].backbone.mixed_precision.param_dtype for side in ("student", "teacher")}
    fp16 = torch.float32 if device.type == "cpu" else torch.float16
    others = {"bf16": torch.bfloat16, "fp16": fp16, "fp64": torch.float64}
    return others.get(names.pop(), torch.float32) if len(names) == 1 else torch.float32


class TrainLoader:
    """Iterates over steps: each item is the list of this rank's micro-batches.

    Args:
        cfg: A merged configuration.
        datalist: The volumes, already filtered.
        start_step: First step to deliver.
        rank, world_size: This rank's share.
        device: Where batches go; through pinned memory to CUDA.

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
        self.datalist = datalist
        self.accumulation_steps = t.accumulation_steps
        self.bad_volumes: dict[str, str] = {}
        self._sampler = sampler = PositionSampler(t.batch_size_per_gpu, t.accumulation_steps, rank, world_size, start_step)
        grid = cfg.crops.global_crops_size // cfg.student.patch_size
        self._collate = Collate(
            t.seed,
            sampler.effective_batch,
            grid**3,
            cfg.ibot.mask_sample_probability,
            tuple(cfg.ibot.mask_ratio_min_max),
        )
        augmentation = build_augmentation(cfg, crop_dtype(cfg, self.device))
        cache = VolumeCache(t.cache_dir, t.cache_max_gb) if t.cache_dir else None
        self._dataset = PretrainDataset(datalist, augmentation, t.seed, t.memory_store_mb * 2**20, cache)
        self._num_workers = t.num_workers

    def __iter__(self) -> Iterator[list[Batch]]:
        batches = self._on_cuda() if self.device.type == "cuda" else self._batches()
        while True:
            yield list(islice(batches, self.accumulation_steps))

    def _on_cuda(self) -> Iterator[Batch]:
        """One batch ahead: copied on a stream of its own while the batch before is computed with."""
        stream, waiting = torch.cuda.Stream(self.device), None
        for batch in self._batches():
            with torch.cuda.stream(stream):
                moved = {k: self._copied(v) if torch.is_tensor(v) else v for k, v in batch.items()}
                copied = stream.record_event()
            if waiting is not None:
                yield self._arrived(*waiting)
            waiting = moved, copied

    def _copied(self, value: torch.Tensor) -> torch.Tensor:
        return value.pin_memory().to(self.device, non_blocking=True)

    def _arrived(self, batch: Batch, copied: torch.cuda.Event) -> Batch:
        """The batch for use on the current stream, its memory kept until that stream is done with it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for value in batch.values():
            if torch.is_tensor(value):
                value.record_stream(current)
        return batch

    def _batches(self) -> Iterator[Batch]:
        for batch in compute_in_order(self._compute, self._sampler, self._num_workers):
            self._report(batch)
            yield batch

    def _compute(self, positions: list[int]) -> Batch:
        return self._collate([self._dataset[position] for position in positions])

    def _report(self, batch: Batch) -> None:
        for path, reason in batch["bad"].items():
            if path not in self.bad_volumes:
                self.bad_volumes[path] = reason
                logger.warning("unusable volume %d, replaced: %s", len(self.bad_volumes), reason)
        if "positions" not in batch:
            reason = next(iter(batch["bad"].values()))
            raise BadInput(f"{self.datalist.path}: none of its {len(self.datalist)} volumes can be used; the first: {reason}")
