"""What an NVIDIA GPU does with the operator and a training step, as a Markdown table for docs/gpu.md.

    python benchmarks/gpu.py [--rounds N] [--batch N]          # scripts/gpu_check builds, tests and runs this

Deformable attention: ours against grid_sample, the cases of ms_deform_attn_3d.py. Training: a ViT-L step with 96 and 48 cubed
crops, 8 local ones, in bf16 and fp16 with its loss scaler. NCCL: a step of a sharded network on every GPU. `--device cpu` runs
it all very small, to see that the program works.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks import ms_deform_attn_3d as operator
from benchmarks import train_step
from dinov2.distributed.runtime import Runtime
from dinov2.models.vision_transformer import vit_tiny_3d
from dinov2.ops import cuda_kernels

LARGE = ["student.arch=vit_large_3d", "dino.head_n_prototypes=65536", "ibot.head_n_prototypes=65536"]


def row(what: str, measured: str) -> None:
    print(f"| {what} | {measured} |", flush=True)


def describe(device: str) -> None:
    """The table's head: the machine."""
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        name = f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 2**30:.0f} GiB"
        version = f"CUDA {torch.version.cuda}, kernels: {cuda_kernels()[1]}"
    else:
        name, version = "CPU", "no CUDA"
    row("what", "measured")
    row("---", "---")
    row("machine", f"{name}; torch {torch.__version__}, {version}")


def time_operator(device: str, dtype: torch.dtype, rounds: int) -> None:
    """Forward and backward of each case, ours and the reference taking turns."""
    for case in operator.CASES if device == "cuda" else ("injector",):
        value, shapes, locations, weights = operator.make_arguments(case, False, device)
        arguments = (value.detach().to(dtype).requires_grad_(), shapes, locations, weights)
        best = {way: (math.inf, math.inf) for way in operator.WAYS}
        for _ in range(rounds + 1):  # the first one also loads kernels
            for way, function in operator.WAYS.items():
                best[way] = tuple(map(min, best[way], operator.passes(function, arguments)))
        for i, name in enumerate(("forward", "backward")):
            ours, reference = 1e3 * best["ours"][i], 1e3 * best["grid_sample"][i]
            what = f"deformable attention, {case}, {str(dtype).removeprefix('torch.')}, {name}"
            row(what, f"{ours:.2f} ms; grid_sample {reference:.2f} ms: {reference / ours:.1f} times")


def time_training(device: str, precision: str, rounds: int, batch: int) -> None:
    """Best time of a step after two that warm up, memory, and whether the loss is finite."""
    words = [f"compute_precision.{s}.{m}.mixed_precision.param_dtype={precision}" for s, m in all_modules()]
    runtime = Runtime(torch.device(device))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    setup = train_step.Setup([*(LARGE if device == "cuda" else train_step.SMALL), *words], batch, device)
    best, loss = math.inf, torch.tensor(math.nan)
    for i in range(rounds + 2):
        start = time.perf_counter()
        loss = setup.step()["total_loss"]
        runtime.synchronize()
        best = min(best, time.perf_counter() - start) if i >= 2 else best
    what = f"training step, {precision}, {batch} volumes, {'ViT-L' if device == 'cuda' else 'a small network'}"
    figures = f"{best:.3f} s, {batch / best:.1f} volumes/s, {runtime.peak_memory_gib():.1f} GiB"
    row(what, f"{figures}, loss {float(loss):.3f}{'' if math.isfinite(loss) else ': NOT FINITE'}")


def all_modules() -> list[tuple[str, str]]:
    return [(side, module) for side in ("student", "teacher") for module in ("backbone", "dino_head", "ibot_head")]


def sharded_step() -> None:
    """One step of a sharded network, in each process that torchrun starts; rank 0 says what came out."""
    rank, device = int(os.environ["LOCAL_RANK"]), os.environ["GPU_CHECK_DEVICE"]
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch.manual_seed(0)
    network = vit_tiny_3d(patch_size=8, img_size=32).to(device)
    x = torch.randn(2, 1, 32, 32, 32, device=device)
    alone = network(x, None, is_training=True)["x_norm_clstoken"].float()
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in network.block_list:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    optimizer = torch.optim.AdamW(network.parameters())
    start = time.perf_counter()
    out = network(x, None, is_training=True)["x_norm_clstoken"].float()
    out.square().sum().backward()
    optimizer.step()
    error = float((out - alone).detach().abs().max())
    if rank == 0:
        seconds = time.perf_counter() - start
        row(
            f"sharded step on {dist.get_world_size()} ranks, {dist.get_backend()}",
            f"{seconds:.2f} s; differs from one process by {error:.1e}",
        )
    dist.destroy_process_group()


def run_sharded_step(device: str) -> int:
    ranks = torch.cuda.device_count() if device == "cuda" else 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "GPU_CHECK_DEVICE": device}
    return subprocess.run([*command, __file__, "--sharded-step"], env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="volumes of a training step")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sharded-step", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sharded_step:
        sharded_step()
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no NVIDIA GPU that this torch can use: `dinov2 doctor` says more", file=sys.stderr)
        return 2
    describe(args.device)
    for dtype in (torch.float32, torch.bfloat16):
        time_operator(args.device, dtype, args.rounds)
    for precision in ("bf16", "fp16"):
        time_training(args.device, precision, args.rounds, args.batch)
    return run_sharded_step(args.device)


if __name__ == "__main__":
    sys.exit(main())
