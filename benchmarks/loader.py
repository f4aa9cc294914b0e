"""How fast the loader delivers batches, alone and with the training step consuming them, and whether its memory stays flat.

    python benchmarks/loader.py LIST [--config pretrain/tiny_cpu] [--workers 0 1 2] [--steps N] [--side-by-side N]
                                     [--memory-batches N] [key=value]

First ours beside torch's `DataLoader` with the same data set, which stacks a batch in new shared memory and then copies it as
to pinned memory: volumes a second, and what the machine's load changes less, processor time and page faults a volume of all
processes. Then, for each back end of the augmentation and number of loader processes, volumes a second with nothing else to do
and with the configuration's own training step (train.num_threads), and the share of the time that the step waits for data. Then
one loader process runs for many batches; its memory (private and shared, PSS) is printed along the way. `key=value` overrides
the configuration; volumes are cached in a temporary folder first. 0 as a number of steps or batches leaves a part out.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2.configs import load_and_merge_config_3d
from dinov2.data import Datalist, TrainLoader, read_datalist
from dinov2.data.cache.commands import build as build_cache
from dinov2.data.workers import keep_freed_memory
from dinov2.distributed.runtime import Runtime
from dinov2.train.build import build
from dinov2.train.schedules import build_schedules
from dinov2.train.state import TrainState
from dinov2.train.train3d import train_step

WARM_UP = 5  # batches before the clock starts


class Draws(Dataset):
    """The crops of a position as tensors of their own."""

    def __init__(self, loader: TrainLoader) -> None:
        self.draw, layout = loader.dataset.draw, loader._layout
        self.sizes = [layout.global_size] * 2 + [layout.local_size] * layout.num_local
        self.dtype = layout.dtype

    def __getitem__(self, position: int) -> list[Tensor]:
        crops = [torch.empty(1, size, size, size, dtype=self.dtype) for size in self.sizes]
        self.draw(position, crops)
        return crops


def stack(samples: list[list[Tensor]]) -> list[Tensor]:
    """Crop-major, global and local, each stacked into new shared memory."""
    parts = []
    for crops in ([s[i] for i in range(2) for s in samples], [s[i] for i in range(2, len(samples[0])) for s in samples]):
        one = crops[0]
        storage = torch.UntypedStorage._new_shared(len(crops) * one.numel() * one.element_size())
        parts.append(torch.stack(crops, out=one.new_empty(0).set_(storage, 0, (len(crops), *one.shape))))
    return parts


def reference(cfg: DictConfig, datalist: Datalist) -> Iterator[list[Tensor]]:
    loader = TrainLoader(cfg, datalist)
    workers = {"num_workers": cfg.train.num_workers, "worker_init_fn": lambda _: keep_freed_memory()}
    for batch in DataLoader(Draws(loader), batch_sampler=loader._sampler, collate_fn=stack, **workers):
        yield [part.clone() for part in batch]  # as pinning does


def spent(pids: list[int]) -> tuple[float, int]:
    """Processor seconds and page faults so far."""
    ticks = faults = 0
    for pid in pids:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks, faults = ticks + int(values[11]) + int(values[12]), faults + int(values[7])
    return ticks / os.sysconf("SC_CLK_TCK"), faults


def side_by_side(cfg: DictConfig, datalist: Datalist, steps: int, rounds: int = 2) -> None:
    """Both ways in turns; the best round of each."""
    best: dict[str, tuple[float, ...]] = {}
    volumes = steps * cfg.train.batch_size_per_gpu
    for _ in range(rounds):
        for name, batches in (("DataLoader", reference(cfg, datalist)), ("ours", iter(TrainLoader(cfg, datalist)))):
            with closing(batches):
                for _ in range(WARM_UP):
                    next(batches)
                pids = [os.getpid(), *(p.pid for p in multiprocessing.active_children())]
                start, before = time.perf_counter(), spent(pids)
                for _ in range(steps):
                    next(batches)
                elapsed, after = time.perf_counter() - start, spent(pids)
            cost = 1e3 * (after[0] - before[0]) / volumes, (after[1] - before[1]) / volumes, -volumes / elapsed
            best[name] = min(best.get(name, cost), cost)
    for name, (cpu_ms, faults, negative_rate) in best.items():
        what = f"{-negative_rate:7.1f} volumes/s, {cpu_ms:6.2f} ms of processor time and {faults:7.1f} page faults a volume"
        print(f"{name:10} {cfg.train.num_workers} loader processes: {what}")


def rate(cfg: DictConfig, datalist: Datalist, steps: int, training: bool) -> tuple[float, float]:
    """Volumes a second and the share of time spent waiting for batches."""
    torch.set_num_threads(cfg.train.num_threads or 1)
    batches = iter(TrainLoader(cfg, datalist))
    if training:
        state = TrainState(*build(cfg, Runtime(torch.device("cpu"))))
        hp = build_schedules(cfg)(100)
    waited = start = 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            waited, start = 0.0, time.perf_counter()
        before = time.perf_counter()
        micro_batches = next(batches)
        waited += time.perf_counter() - before
        if training:
            train_step(state, hp, micro_batches, cfg.optim.clip_grad, False)
    elapsed = time.perf_counter() - start
    volumes = steps * cfg.train.batch_size_per_gpu * cfg.train.accumulation_steps
    return volumes / elapsed, waited / elapsed


def pss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def memory(cfg: DictConfig, datalist: Datalist, num_batches: int) -> None:
    batches = iter(TrainLoader(cfg, datalist))
    next(batches)
    (worker,) = multiprocessing.active_children()
    marks = sorted({max(1, num_batches * k // 10) for k in (1, 2, 4, 6, 8, 10)})
    seen = []
    for i in range(1, num_batches + 1):
        next(batches)
        if i in marks:
            seen.append(f"{i}: {pss_mib(worker.pid):.0f}")
    print(f"memory of a loader process (MiB) after batch {', '.join(seen)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path)
    parser.add_argument("--config", default="pretrain/tiny_cpu")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--side-by-side", type=int, default=30, help="batches of each way in turn")
    parser.add_argument("--memory-batches", type=int, default=2000)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    datalist = read_datalist(args.list)
    with tempfile.TemporaryDirectory() as folder:
        build_cache(datalist, Path(folder), None, 2, print)

        def config(backend: str, workers: int) -> DictConfig:
            keys = [f"train.cache_dir={folder}", f"train.augmentation={backend}", f"train.num_workers={workers}"]
            return load_and_merge_config_3d(args.config, [*args.overrides, *keys])

        usable = datalist.larger_than(config("fast", 0).train.data_min_axis_size)
        for workers in filter(None, args.workers if args.side_by_side else ()):
            side_by_side(config("fast", workers), usable, args.side_by_side)
        for backend, workers in itertools.product(("monai", "fast"), args.workers if args.steps else ()):
            cfg = config(backend, workers)
            alone, _ = rate(cfg, usable, args.steps, training=False)
            consumed, waiting = rate(cfg, usable, args.steps, training=True)
            print(
                f"{backend:6} {workers} loader processes: {alone:7.1f} volumes/s alone, {consumed:7.1f} while training, "
                f"{waiting:5.1%} of it waiting"
            )
        if args.memory_batches:
            memory(config("fast", 1), usable, args.memory_batches)


if __name__ == "__main__":
    main()
