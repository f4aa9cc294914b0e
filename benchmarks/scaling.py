"""What a training step costs against ranks, batch, crop size and depth: time, memory per rank, matrix-product FLOPs.

    python benchmarks/scaling.py [--rounds N] [--ranks 1 2 4] [--arch vit_tiny_3d]

Each row is a process group of its own on this machine's CPU (gloo), one thread a rank, random voxels. Ranks share the cores,
so several ranks show memory and the cost of communication, not a speed-up; the effective batch is the same in each row of the
first table. Held: a rank's weights, gradients and moments.
Peak: its resident memory during two steps in which the C library gives back at once what is freed, less what it was before the
model was made; both are the largest of the ranks. The steps that are timed come after, with the library's usual behaviour.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torch.distributed.tensor import DTensor

from dinov2.train.state import TrainState

BASE = {
    "dino.head_n_prototypes": 4096,
    "ibot.head_n_prototypes": 4096,
    "student.block_chunks": 0,
    "student.drop_path_rate": 0,
    "crops.global_crops_size": 48,
    "crops.local_crops_size": 32,
    "crops.local_crops_number": 4,
}
BIG = {"crops__global_crops_size": 96, "crops__local_crops_size": 48}  # where activations outweigh the rest
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
MODULES = [f"{side}.{module}" for side in ("student", "teacher") for module in ("backbone", "dino_head", "ibot_head")]
BASE |= {f"compute_precision.{m}.mixed_precision.param_dtype": "fp32" for m in MODULES}


def give_back_at_once(on: bool) -> None:
    """Whether the C library maps every block of more than 64 KiB by itself (or, as usual, of more than 32 MiB)."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 2**10 if on else 32 * 2**20)


def peak_mib(reset: bool = False) -> float:
    """This process's peak of resident memory (since the last reset), with what is free given back first."""
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def held_mib(state: TrainState) -> float:
    """Bytes of this rank's weights (student and teacher), gradients and moments."""
    params = [*state.model.student.parameters(), *state.model.teacher.parameters()]
    tensors = [*params, *(p.grad for p in params if p.grad is not None)]
    tensors += [v for values in state.optimizer.state.values() for v in values.values()]
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors) / 2**20


def measure(overrides: dict[str, object], rounds: int) -> None:
    """In a rank: one row of JSON on rank 0."""
    from benchmarks.train_step import HP, random_batch
    from dinov2.configs import load_and_merge_config_3d
    from dinov2.distributed import gather_objects
    from dinov2.distributed.runtime import start_runtime, stop_runtime
    from dinov2.train.build import build
    from dinov2.train.flops import step_flops
    from dinov2.train.train3d import train_step

    cfg = load_and_merge_config_3d(None, [f"{k}={json.dumps(v)}" for k, v in {**BASE, **overrides}.items()])
    runtime = start_runtime(1)
    give_back_at_once(True)
    before = peak_mib(reset=True)
    batch = random_batch(cfg, cfg.train.batch_size_per_gpu)
    state = TrainState(*build(cfg, runtime))
    peak_mib(reset=True)  # the whole model was on every rank until it was shared out
    flops = step_flops(state.model, [batch])  # torch's counter does not see attention on a CPU
    for _ in range(2):
        train_step(state, HP, [batch], 3.0, monitor=False)  # the first makes the moments only at its end
    memory = max(gather_objects(peak_mib() - before))
    give_back_at_once(False)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        train_step(state, HP, [batch], 3.0, monitor=False)
        times.append(time.perf_counter() - start)
    held = max(gather_objects(held_mib(state)))
    if runtime.rank == 0:
        print("ROW " + json.dumps({"s": min(times), "mib": memory, "held": held, "gflop": flops / 1e9}))
    stop_runtime()


def row(name: str, ranks: int, overrides: dict[str, object], rounds: int) -> None:
    """Run one layout and print it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    words = [__file__, "--in-rank", json.dumps(overrides), "--rounds", str(rounds)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True, env=environment)
    lines = [line for line in result.stdout.splitlines() if line.startswith("ROW ")]
    if not lines:
        sys.exit(f"{name}: {result.stderr[-2000:]}")
    r = json.loads(lines[0].removeprefix("ROW "))
    print(f"{name:44} {r['s']:7.3f} s/step  {r['held']:7.0f} MiB held  {r['mib']:7.0f} MiB peak  {r['gflop']:8.1f} GFLOP/rank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--arch", default="vit_small_3d")
    parser.add_argument("--in-rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_rank:
        measure(json.loads(args.in_rank), args.rounds)
        return
    arch = {"student.arch": args.arch}
    for ranks in args.ranks:
        for strategy in ("ddp", "fsdp") if ranks > 1 else ("single",):
            words = {**arch, "train.batch_size_per_gpu": 4 // ranks, "train.strategy": strategy}
            row(f"{ranks} ranks, {strategy}, 4 volumes together", ranks, words, args.rounds)

    def alone(name: str, **words: object) -> None:
        row(name, 1, {**arch, **{k.replace("__", "."): v for k, v in words.items()}}, args.rounds)

    for mode in ("none", "full"):
        alone(
            f"8 volumes of 96 and 48, recomputed: {mode}",
            train__batch_size_per_gpu=8,
            **BIG,
            train__activation_checkpointing=mode,
        )
    for batch in (1, 2, 4, 8):
        alone(f"batch {batch}", train__batch_size_per_gpu=batch)
    for size in (32, 48, 64, 96):
        alone(f"global crops of {size} cubed, batch 2", train__batch_size_per_gpu=2, crops__global_crops_size=size)
    for depth in (3, 6, 12, 24):
        alone(f"depth {depth}, batch 2", train__batch_size_per_gpu=2, student__depth=depth)


if __name__ == "__main__":
    main()
