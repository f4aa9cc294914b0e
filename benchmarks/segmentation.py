"""What a segmentation costs: an iteration, a sliding window over a volume, and memory, for each decoder.

    python benchmarks/segmentation.py [--arch vit_small_3d] [--size 96] [--threads N] [--large]

Random voxels, one channel, 14 outputs, a frozen backbone with patches of 16. Each row runs in a process of its own; memory is
the peak of what the process holds beyond what it held before the network was made. The adapter is timed with the compiled
deformable attention and with the grid_sample reference, in turn. `--large` adds one step of the ViT-L adapter at 112 cubed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

ROUNDS = 3
VOLUME = 1.5  # edge of the volume that the window slides over, in windows


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(arch: str, size: int, head: str, threads: int, reference: bool, rounds: int) -> dict[str, float]:
    """One row, in this process."""
    from monai.inferers import sliding_window_inference

    from dinov2.configs import load_and_merge_config_3d
    from dinov2.data.downstream.recipes import Recipe
    from dinov2.distributed.runtime import Runtime
    from dinov2.eval.segmentation_3d import deformable
    from dinov2.eval.segmentation_3d.build import Task, build_segmentation
    from dinov2.eval.segmentation_3d.losses import build_loss
    from dinov2.features.setup import build_model_for_eval
    from dinov2.ops import ms_deform_attn_3d_reference

    torch.set_num_threads(threads)
    if reference:
        deformable.ms_deform_attn_3d = ms_deform_attn_3d_reference
    recipe = Recipe(classes={i: str(i) for i in range(14)}, name="timing")
    cfg = load_and_merge_config_3d(None, [f"student.arch={arch}"])
    before = peak_mib()
    runtime = Runtime(torch.device("cpu"))
    backbone = build_model_for_eval(cfg, "random", runtime)
    model = build_segmentation(cfg, backbone, Task(recipe, head, size, 1.0), False, runtime)
    loss, optimizer = build_loss(recipe), torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    images, labels = torch.randn(1, 1, size, size, size), torch.randint(0, 14, (1, 1, size, size, size))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss(model(images), labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    memory = peak_mib() - before
    edge, start = int(VOLUME * size), time.perf_counter()
    with torch.inference_mode():
        sliding_window_inference(torch.randn(1, 1, edge, edge, edge), (size,) * 3, 1, model.eval(), overlap=0.5)
    return {"step_s": min(times), "window_s": time.perf_counter() - start, "mib": memory}


def row(name: str, **what: object) -> dict[str, float]:
    """Run one measurement in a new process and print it."""
    command = [sys.executable, __file__, "--in-process", json.dumps(what)]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("ROW ")]
    if not lines:
        sys.exit(f"{name}: {result.stderr[-2000:]}")
    r = json.loads(lines[0].removeprefix("ROW "))
    print(f"{name:52} {r['step_s']:7.2f} s/iteration  {r['window_s']:7.2f} s sliding window  {r['mib']:6.0f} MiB", flush=True)
    return r


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small_3d")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--large", action="store_true", help="ViT-L adapter at 112 cubed, batch 1, one step")
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print("ROW " + json.dumps(measure(**json.loads(args.in_process))))
        return
    common = {"arch": args.arch, "size": args.size, "threads": args.threads, "rounds": ROUNDS}
    for head in ("Linear", "UNETR"):
        row(f"{args.arch}, {args.size} cubed, {head}", head=head, reference=False, **common)
    ours = row(f"{args.arch}, {args.size} cubed, adapter, compiled", head="ViTAdapterUNETR", reference=False, **common)
    theirs = row(f"{args.arch}, {args.size} cubed, adapter, grid_sample", head="ViTAdapterUNETR", reference=True, **common)
    ratios = [theirs[k] / ours[k] for k in ("step_s", "window_s", "mib")]
    print("adapter, grid_sample / compiled: iteration {:.2f}x, sliding window {:.2f}x, memory {:.2f}x".format(*ratios))
    if args.large:
        large = {**common, "arch": "vit_large_3d", "size": 112, "rounds": 1}
        row("vit_large_3d, 112 cubed, adapter, compiled, one step", head="ViTAdapterUNETR", reference=False, **large)


if __name__ == "__main__":
    main()
