"""A configuration's loader, network, and both together, timed on this machine for a while.

Time is told apart by what a thread did with it: on a core, in the queue for one, or waiting for something else, such as a disk.
So what other programs take from the machine does not count as anything of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf

from dinov2.data import Datalist, TrainLoader
from dinov2.data.collate import Batch
from dinov2.data.loaders import VOXEL_BYTES
from dinov2.distributed.runtime import Runtime
from dinov2.train.forecast import out_of_memory_explained
from dinov2.train.schedules import build_schedules
from dinov2.train.state import TrainState
from dinov2.train.train3d import train_step

WARM_UP = 3  # draws, batches and steps before the clock counts; a compiled step has all its graphs then
FEWEST = 2  # that are timed, however long they take
FIRST_BATCH = 4  # volumes of the first step on a CPU, which says how many more fit into the time
SMALLEST_BATCH = 2  # volumes; KoLeo compares those of a batch

T = TypeVar("T")


@dataclass(frozen=True)
class Time:
    """Seconds of this thread: all, on a core, in the queue for one (0 where the system does not count it)."""

    wall: float
    on_core: float
    queued: float

    @property
    def waited(self) -> float:
        """Neither on a core nor for want of one: for a disk, a device, other threads."""
        return max(0.0, self.wall - self.on_core - self.queued)

    @property
    def quiet(self) -> float:
        """What it would have been with a core always free."""
        return max(0.0, self.wall - self.queued)

    def __add__(self, other: Time) -> Time:
        return Time(self.wall + other.wall, self.on_core + other.on_core, self.queued + other.queued)

    def __sub__(self, other: Time) -> Time:
        return Time(self.wall - other.wall, self.on_core - other.on_core, self.queued - other.queued)

    @classmethod
    def now(cls) -> Time:
        try:
            queued = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            queued = 0.0
        return cls(time.perf_counter(), time.thread_time(), queued)


NO_TIME = Time(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Measured:
    """Of one process and device; seconds are a volume's, on an otherwise idle machine as far as that can be told.

    Attributes:
        disk_s, decode_s, augment_s: Of one loader process: waiting for files, computing from them, making crops.
        transfer_s: Copying to the device; 0 on a CPU.
        compute_s: The update.
        num_workers: Loader processes; 0: the training process loads.
        queued: Share of the time in which no core was free for what ran alone.
        loader_rate, model_rate, rate: Volumes a second of the loader alone, the step alone, and both, disturbed as they were.
        data_wait: Share of the time that the step waited for data.
        batch: Volumes a pass that were timed.
        memory_gib: Peak of the device, or of the process on a CPU.
    """

    disk_s: float
    decode_s: float
    augment_s: float
    transfer_s: float
    compute_s: float
    num_workers: int
    queued: float
    loader_rate: float
    model_rate: float
    rate: float
    data_wait: float
    batch: int
    memory_gib: float


def with_batch(cfg: DictConfig, batch: int) -> DictConfig:
    """The configuration with so many volumes a pass, and a pass an update."""
    changed = cfg.copy()
    OmegaConf.set_readonly(changed, False)
    changed.train.batch_size_per_gpu, changed.train.accumulation_steps = batch, 1
    OmegaConf.set_readonly(changed, True)
    return changed


def timed(seconds: float, work: Callable[[], T], done: Callable[[T], None] = lambda _: None) -> list[Time]:
    """Times of calls of `work` over about so many seconds, after a few that do not count."""
    times: list[Time] = []
    until = time.perf_counter() + seconds
    for number in count():
        before = Time.now()
        result = work()
        if number >= WARM_UP:
            times.append(Time.now() - before)
        done(result)
        if len(times) >= FEWEST and time.perf_counter() > until:
            return times
    raise AssertionError("count() ends never")


def measure_drawing(loader: TrainLoader, seconds: float) -> tuple[Time, Time]:
    """A volume's time, of this process alone: until it is in memory, and making its crops."""
    reading: list[Time] = []
    with _reads_counted(loader.dataset.store, reading):
        batches = loader.drawn_here()

        def draw() -> None:
            reading.append(NO_TIME)
            next(batches)

        drawing = timed(seconds, draw)
    read = sum(reading[WARM_UP:], NO_TIME)
    whole = sum(drawing, NO_TIME)
    each = 1 / len(drawing)
    return _scaled(read, each), _scaled(whole - read, each)


@contextmanager
def _reads_counted(store: Any, reading: list[Time]) -> Iterator[None]:
    """Add what `store.get` takes to the last time of a list."""
    get = store.get

    def counted(*args: Any) -> Any:
        before = Time.now()
        try:
            return get(*args)
        finally:
            reading[-1] = reading[-1] + (Time.now() - before)

    store.get = counted
    try:
        yield
    finally:
        store.get = get


def _scaled(t: Time, factor: float) -> Time:
    return Time(t.wall * factor, t.on_core * factor, t.queued * factor)


def read_share(loader: TrainLoader) -> float:
    """The share of draws whose volume a loader process does not find in its own memory, in the long run."""
    voxels = sum(VOXEL_BYTES * torch.Size(entry.shape).numel() for entry in loader.datalist.entries)
    return max(0.0, 1 - loader.dataset.store.max_bytes / voxels)


def measure_loader(loader: TrainLoader, seconds: float) -> float:
    """Volumes a second of the loader with nothing else to do."""
    with closing(iter(loader)) as batches:
        times = timed(seconds, lambda: next(batches))
    return loader.batch_size * len(times) / sum(t.wall for t in times)


class Training:
    """A network that is trained a step at a time.

    Args:
        cfg: A merged configuration.
        state: Of `build`.
        runtime: Where.
    """

    def __init__(self, cfg: DictConfig, state: TrainState, runtime: Runtime) -> None:
        self.cfg, self.state, self.runtime = cfg, state, runtime
        self._hp = build_schedules(cfg)(0)

    def step(self, batches: list[Batch]) -> None:
        with out_of_memory_explained(self.cfg, self.state.model.compile_state != "off"):
            train_step(self.state, self._hp, batches, self.cfg.optim.clip_grad, False)
            self.runtime.synchronize()

    def alone(self, batch: Batch, seconds: float) -> list[Time]:
        return timed(seconds, lambda: self.step([batch]))

    def batch_in(self, cfg: DictConfig, datalist: Datalist, seconds: float) -> int:
        """On a CPU, how many volumes a pass leave time for some steps; elsewhere the configuration's."""
        most = cfg.train.batch_size_per_gpu
        if self.runtime.device.type != "cpu":
            return most
        first = min(most, FIRST_BATCH)
        batch = first_batch(with_batch(cfg, first), datalist, self.runtime.device)
        each = min(self._seconds(batch) for _ in range(2)) / first
        fits = int(seconds / (WARM_UP + 2 * FEWEST) / each)
        return max(min(SMALLEST_BATCH, most), min(most, fits))

    def _seconds(self, batch: Batch) -> float:
        start = time.perf_counter()
        self.step([batch])
        return time.perf_counter() - start

    def end_to_end(self, loader: TrainLoader, seconds: float) -> tuple[float, float]:
        """Volumes a second of loader and steps together, and the share of waiting for data."""
        with closing(iter(loader)) as batches:
            waits: list[float] = []

            def step() -> None:
                before = time.perf_counter()
                batch = next(batches)
                waits.append(time.perf_counter() - before)
                self.step(batch)

            wall = sum(t.wall for t in timed(seconds, step))
        return loader.batch_size * (len(waits) - WARM_UP) / wall, sum(waits[WARM_UP:]) / wall


def first_batch(cfg: DictConfig, datalist: Datalist, device: torch.device) -> Batch:
    """A batch made by this process."""
    alone = cfg.copy()
    OmegaConf.set_readonly(alone, False)
    alone.train.num_workers = 0
    with closing(iter(TrainLoader(alone, datalist, device=device))) as batches:
        return next(batches)[0]


def transfer_s(batch: Batch, device: torch.device) -> float:
    """Seconds to copy a batch to a CUDA device, best of a few."""
    if device.type != "cuda":
        return 0.0
    tensors = [value.cpu().pin_memory() for value in batch.values() if torch.is_tensor(value)]
    times = []
    for _ in range(WARM_UP + FEWEST):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for tensor in tensors:
            tensor.to(device, non_blocking=True)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def measure(cfg: DictConfig, datalist: Datalist, state: TrainState, runtime: Runtime, seconds: float) -> Measured:
    """All of it in about so many seconds (more where a single step takes long).

    Args:
        cfg: A merged configuration.
        datalist: The volumes, already filtered.
        state: Of `build`.
        runtime: Where.
        seconds: To be shared out.
    """
    training = Training(cfg, state, runtime)
    batch = training.batch_in(cfg, datalist, seconds / 3)
    cfg = with_batch(cfg, batch)
    loader = TrainLoader(cfg, datalist, device=runtime.device)
    read, crops = measure_drawing(loader, seconds / 6)
    loader_rate = measure_loader(TrainLoader(cfg, datalist, device=runtime.device), seconds / 6)
    one = first_batch(cfg, datalist, runtime.device)
    steps = training.alone(one, seconds / 3)
    rate, wait = training.end_to_end(TrainLoader(cfg, datalist, device=runtime.device), seconds / 3)
    alone = read + crops + sum(steps, NO_TIME)
    share = read_share(loader)
    return Measured(
        disk_s=read.waited * share,
        decode_s=read.on_core * share,
        augment_s=crops.quiet,
        transfer_s=transfer_s(one, runtime.device) / batch,
        compute_s=median(t.quiet for t in steps) / batch,
        num_workers=loader.num_workers,
        queued=alone.queued / alone.wall,
        loader_rate=loader_rate,
        model_rate=batch / median(t.wall for t in steps),
        rate=rate,
        data_wait=wait,
        batch=batch,
        memory_gib=runtime.peak_memory_gib(),
    )
