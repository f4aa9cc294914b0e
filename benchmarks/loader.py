"""How fast the loader delivers batches, alone and with the training step consuming them, and whether its memory stays flat.

    python benchmarks/loader.py LIST [--config pretrain/tiny_cpu] [--workers 0 1 2] [--steps N] [--memory-batches N] [key=value]

For each back end of the augmentation and number of loader processes: volumes a second with nothing else to do, then with
the configuration's own training step (train.num_threads), and the share of the time that the step waits for data. Then
one loader process runs for many batches; its memory (private and shared, PSS) is printed along the way. `key=value`
overrides the configuration; volumes are cached in a temporary folder first.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import DictConfig

from dinov2.configs import load_and_merge_config_3d
from dinov2.data import Datalist, TrainLoader, read_datalist
from dinov2.data.cache_commands import build as build_cache
from dinov2.distributed.runtime import Runtime
from dinov2.train.build import build
from dinov2.train.schedules import build_schedules
from dinov2.train.state import TrainState
from dinov2.train.train3d import train_step

WARM_UP = 5  # batches before the clock starts


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
        for backend, workers in itertools.product(("monai", "fast"), args.workers):
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
