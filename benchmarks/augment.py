"""What ten crops of a cached volume cost: the fast back end against the MONAI reference applying the same plans.

    python benchmarks/augment.py [--plans N] [--rounds N] [--shape H W D]

Two crops of 96 cubed and eight of 48 cubed, as in the paper, from 16-bit voxels (fast) and the same in float32 (MONAI), on
one core. The back ends alternate plan by plan; the best of N rounds of each plan counts, and the sums are compared.
`geometry` is the crop, resize, flips and turns alone. The last table times each operation on a crop of 96 cubed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from dinov2.data import DataAugmentationDINO3d
from dinov2.data.augmentation import fast as apply_fast
from dinov2.data.augmentation import monai as apply_monai
from dinov2.data.augmentation import plan as ap
from dinov2.data.workers import keep_freed_memory
from dinov2.ops import augmentation as ops
from dinov2.ops import compiled_operators

Apply = Callable[[Tensor, ap.CropPlan], Tensor]
OPERATIONS = {
    "gamma": ap.Gamma(0.7),
    "noise": ap.Noise(0.001, 1),
    "histogram shift": ap.HistogramShift(tuple(np.linspace(0, 1, 10) ** 2)),
    "smooth": ap.Smooth((1.0, 1.0, 1.0)),
    "sharpen": ap.Sharpen((0.75,) * 3, (0.6,) * 3, 20.0),
    "Gibbs": ap.Gibbs(0.4),
}


def best_ms(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def plain_torch(work: Callable[[], object]) -> Callable[[], object]:
    """The same work without the compiled operators."""

    def run() -> None:
        compiled_for, ops.COMPILED_FOR = ops.COMPILED_FOR, frozenset()
        try:
            work()
        finally:
            ops.COMPILED_FOR = compiled_for

    return run


def all_crops(apply: Apply, volume: Tensor, crops: list[ap.CropPlan]) -> Callable[[], object]:
    return lambda: [apply(volume, c) for c in crops]


def compare(name: str, volume: Tensor, as_float: Tensor, plans: list[list[ap.CropPlan]], rounds: int) -> None:
    """Sum over plans of each way's best time."""
    sums = {"MONAI": 0.0, "fast": 0.0, "fast, PyTorch": 0.0}
    for crops in plans:
        ways = {
            "MONAI": all_crops(apply_monai.apply_crop, as_float, crops),
            "fast": all_crops(apply_fast.apply_crop, volume, crops),
            "fast, PyTorch": plain_torch(all_crops(apply_fast.apply_crop, volume, crops)),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(rounds):
            for way, work in ways.items():
                best[way] = min(best[way], best_ms(work, 1))
        for way in ways:
            sums[way] += best[way]
    for way, total in sums.items():
        print(f"{name:10} {way:14} {total / len(plans):8.2f} ms a volume {sums['MONAI'] / total:7.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 180))
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as in a loader process
    rng = np.random.default_rng(0)
    voxels = rng.integers(-32767, 32768, (1, *args.shape), dtype=np.int16)  # the values do not matter to the time
    volume = torch.from_numpy(voxels)
    as_float = volume.float() / 32767
    augmentation = DataAugmentationDINO3d()
    plans = [augmentation.plan(tuple(args.shape), np.random.default_rng(s)) for s in range(args.plans)]
    whole = [[*p.global_crops, *p.local_crops] for p in plans]
    geometry = [[dataclasses.replace(c, intensity=()) for c in crops] for crops in whole]
    print(f"volume {tuple(args.shape)}, {args.plans} plans of ten crops, one core; compiled: {compiled_operators()[1]}")
    compare("whole", volume, as_float, whole, args.rounds)
    compare("geometry", volume, as_float, geometry, args.rounds)
    crop = torch.rand(1, 96, 96, 96)
    for name, step in OPERATIONS.items():
        reference = best_ms(lambda step=step: apply_monai.apply_intensity(crop, step), args.rounds)
        ours = best_ms(lambda step=step: apply_fast.apply_intensity_(crop.clone(), step), 3 * args.rounds)
        print(f"96 cubed   {name:16} MONAI {reference:7.2f} ms   fast {ours:6.2f} ms (with a copy) {reference / ours:6.1f} x")


if __name__ == "__main__":
    main()
