"""What 3D deformable attention costs on the CPU: the compiled operator against its grid_sample reference.

    python benchmarks/ms_deform_attn_3d.py [--rounds N] [--threads N] [--cases NAME ...] [--random]

The paper's injector (343 queries over 28, 14 and 7 cubed), its extractor (25,039 queries over 7 cubed), and a large case
(25,039 queries over all three levels); 8 heads of 32 channels, 4 points, fp32, one volume. Points lie around each query's own
place as the adapter's do when training begins (one to four voxels along a diagonal for each point, a direction for each head),
jittered; with --random anywhere in the volume. The two ways take turns; the best of N rounds counts. Memory is the most that a
fresh process held during one forward and backward pass, beyond its inputs and what any way must hold: the output and all
gradients.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from dinov2.ops import ms_deform_attn_3d, ms_deform_attn_3d_reference
from dinov2.ops.extension import implementation

PYRAMID = [(28, 28, 28), (14, 14, 14), (7, 7, 7)]
CASES = {  # grids of the queries, levels of the value
    "injector": ([(7, 7, 7)], PYRAMID),
    "extractor": (PYRAMID, [(7, 7, 7)]),
    "large": (PYRAMID, PYRAMID),
}
WAYS = {"grid_sample": ms_deform_attn_3d_reference, "ours": ms_deform_attn_3d}
HEADS, CHANNELS, POINTS = 8, 32, 4
Arguments = tuple[Tensor, list[tuple[int, int, int]], Tensor, Tensor]


def make_arguments(case: str, random: bool, device: str = "cpu") -> Arguments:
    """Value, spatial_shapes, locations and weights of a case, with gradients wanted."""
    generator = torch.Generator().manual_seed(0)
    query_grids, shapes = CASES[case]
    centres = [torch.cartesian_prod(*((torch.arange(n) + 0.5) / n for n in grid)) for grid in query_grids]
    places = torch.cat(centres)[:, None, None, None]  # [Q, 1, 1, 1, 3]
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).view(HEADS, 1, 1, 3)
    steps = signs * torch.arange(1, POINTS + 1).view(-1, 1)  # voxels, [M, 1, P, 3]
    locations = places + steps / torch.tensor(shapes).view(-1, 1, 3)  # [Q, M, L, P, 3]
    locations = torch.rand(locations.shape, generator=generator) if random else locations
    locations = locations + 0.01 * torch.randn(locations.shape, generator=generator)
    weights = torch.rand(locations.shape[:-1], generator=generator)
    value = torch.randn(1, sum(h * w * d for h, w, d in shapes), HEADS, CHANNELS, generator=generator)
    value, locations, weights = (x.to(device).requires_grad_() for x in (value, locations[None], weights[None]))
    return value, shapes, locations, weights


def passes(way: Callable[..., Tensor], arguments: Arguments) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass."""
    value, _, locations, weights = arguments
    synchronize = torch.cuda.synchronize if value.is_cuda else lambda: None
    start = time.perf_counter()
    out = way(*arguments)
    synchronize()
    middle = time.perf_counter()
    torch.autograd.grad(out, (value, locations, weights), torch.ones_like(out))
    synchronize()
    return middle - start, time.perf_counter() - middle


def resident_mib(what: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    return int(re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def extra_mib(case: str, way: str, random: bool) -> float:
    """Peak memory beyond inputs and results of one forward and backward pass, in this (fresh) process."""
    small = (torch.rand(1, 8, 1, 8), [(2, 2, 2)], torch.rand(1, 2, 1, 1, 1, 3), torch.rand(1, 2, 1, 1, 1))
    passes(WAYS[way], tuple(x.requires_grad_() if isinstance(x, Tensor) else x for x in small))  # loads what is loaded once
    arguments = make_arguments(case, random)
    Path("/proc/self/clear_refs").write_text("5")  # the most so far starts again from now
    before = resident_mib("VmRSS")
    passes(WAYS[way], arguments)
    value, _, locations, weights = arguments
    results = value.numel() + locations.numel() + weights.numel() + 2 * locations.shape[1] * HEADS * CHANNELS
    return max(0.0, resident_mib("VmHWM") - before - 4 * results / 2**20)


def measure_memory(case: str, way: str, random: bool) -> float:
    command = [sys.executable, __file__, "--memory-of", case, way, *(["--random"] if random else [])]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def compare(case: str, rounds: int, random: bool) -> None:
    arguments = make_arguments(case, random)
    best = {way: (float("inf"), float("inf")) for way in WAYS}
    for _ in range(rounds):
        for way, function in WAYS.items():
            best[way] = tuple(map(min, best[way], passes(function, arguments)))
    memory = {way: measure_memory(case, way, random) for way in WAYS}
    for i, name in enumerate(("forward", "backward")):
        reference, ours = 1e3 * best["grid_sample"][i], 1e3 * best["ours"][i]
        print(f"{case:10} {name:9} grid_sample {reference:8.1f} ms   ours {ours:7.1f} ms {reference / ours:7.1f} x")
    reference, ours = memory["grid_sample"], memory["ours"]
    print(f"{case:10} {'memory':9} grid_sample {reference:8.1f} MiB  ours {ours:7.1f} MiB {ours / reference:6.2f} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--random", action="store_true", help="points anywhere")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(extra_mib(*args.memory_of, args.random)))
        return
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, best of {args.rounds}; ours: {implementation('cpu')[1]}"
    )
    for case in args.cases:
        compare(case, args.rounds, args.random)


if __name__ == "__main__":
    main()
