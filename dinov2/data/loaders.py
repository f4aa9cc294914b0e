"""The loader of a training run: batches from a step on, the same for any number of workers."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from dinov2.data.augmentations import DataAugmentationDINO3d
from dinov2.data.collate import Batch, Collate
from dinov2.data.datalist import Datalist
from dinov2.data.dataset import PretrainDataset
from dinov2.data.samplers import PositionSampler
from dinov2.errors import BadInput

logger = logging.getLogger(__name__)


def build_augmentation(cfg: DictConfig) -> DataAugmentationDINO3d:
    """The augmentation of a configuration's `crops`."""
    return DataAugmentationDINO3d(**cfg.crops)


class TrainLoader:
    """Iterates over steps: each item is the list of this rank's micro-batches.

    Args:
        cfg: A merged configuration.
        datalist: The volumes, already filtered.
        start_step: First step to deliver.
        rank, world_size: This rank's share.
        device: Where batches go; pinned memory is used for CUDA.

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
        sampler = PositionSampler(t.batch_size_per_gpu, t.accumulation_steps, rank, world_size, start_step)
        grid = cfg.crops.global_crops_size // cfg.student.patch_size
        collate = Collate(
            t.seed,
            sampler.effective_batch,
            grid**3,
            cfg.ibot.mask_sample_probability,
            tuple(cfg.ibot.mask_ratio_min_max),
        )
        dataset = PretrainDataset(datalist, build_augmentation(cfg), t.seed, t.memory_store_mb * 2**20)
        self._loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=t.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        micro_batches: list[Batch] = []
        for batch in self._batches():
            self._report(batch)
            micro_batches.append({k: self._to_device(v) for k, v in batch.items()})
            if len(micro_batches) == self.accumulation_steps:
                yield micro_batches
                micro_batches = []

    def _batches(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches)
            except RuntimeError as err:  # torch's only sign of a worker that was killed
                if "DataLoader worker" not in str(err):
                    raise
                reason = str(err).splitlines()[0]
                raise BadInput(f"{reason}: most likely memory ran out: use fewer train.num_workers or volumes") from err
            yield batch

    def _to_device(self, value: object) -> object:
        return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    def _report(self, batch: Batch) -> None:
        for path, reason in batch["bad"].items():
            if path not in self.bad_volumes:
                self.bad_volumes[path] = reason
                logger.warning("unusable volume %d, replaced: %s", len(self.bad_volumes), reason)
        if "positions" not in batch:
            reason = next(iter(batch["bad"].values()))
            raise BadInput(f"{self.datalist.path}: none of its {len(self.datalist)} volumes can be used; the first: {reason}")


def _start_worker(_worker: int) -> None:
    """One thread each (the workers are the parallelism), and signals left to the main process.

    A scheduler signals the whole job; the main process finishes its step, which needs them, and then ends them itself.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
