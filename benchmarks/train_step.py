"""How close a training step is to its own matrix products, and what packing and stochastic depth on a subset save.

    python benchmarks/train_step.py [--rounds N] [--scaling] [--small]

ViT-S/16-3D, batch 4, 96 cubed and 48 cubed crops, 8 local crops, 8,192 prototypes, fp32, on the CPU; the whole step:
teacher, student, losses, backward, clipping, AdamW, moving average. The reference is the list of matrix products that
the step calls, recorded once and timed alone in the same run. Variants alternate; the best of N rounds counts.
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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2.configs import load_and_merge_config_3d
from dinov2.data.collate import BatchLayout, Masking, collate
from dinov2.distributed.runtime import Runtime
from dinov2.train.build import build
from dinov2.train.schedules import StepParams
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.state import TrainState
from dinov2.train.train3d import train_step

aten = torch.ops.aten
HP = StepParams(lr=1e-4, wd=0.04, mom=0.99, teacher_temp=0.05, last_layer_lr=1e-4)
BASE = ["student.arch=vit_small_3d", "dino.head_n_prototypes=8192", "ibot.head_n_prototypes=8192", "student.block_chunks=0"]
SMALL = ["student.depth=2", "crops.global_crops_size=48", "crops.local_crops_size=16", "crops.local_crops_number=2"]


class Setup:
    """A model and one random batch."""

    def __init__(self, overrides: list[str], batch: int = 4, device: str = "cpu") -> None:
        cfg = load_and_merge_config_3d(None, [*BASE, f"train.batch_size_per_gpu={batch}", *overrides])
        model, optimizer = build(cfg, Runtime(torch.device(device)))
        self.state = TrainState(model, optimizer)
        self.batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in random_batch(cfg, batch).items()}

    def step(self) -> dict[str, Tensor]:
        return train_step(self.state, HP, [self.batch], clip_grad=3.0, monitor=False)

    @property
    def model(self) -> SSLMetaArch:
        return self.state.model


def random_batch(cfg: Any, batch: int) -> dict[str, Any]:
    """What the loader delivers, with noise for voxels and the paper's masks."""
    c = cfg.crops
    grid = c.global_crops_size // cfg.student.patch_size
    layout = BatchLayout(batch, c.global_crops_size, c.local_crops_size, c.local_crops_number, grid**3)
    rows = layout.rows(np.empty(layout.nbytes, np.uint8))
    for voxels in (rows.global_crops, rows.local_crops):
        voxels.normal_()
    masking = Masking(0, batch, cfg.ibot.mask_sample_probability, tuple(cfg.ibot.mask_ratio_min_max))
    upperbound = masking.write(range(batch), rows.masks)
    return collate(rows, range(batch), [{"sample_id": str(i), "bad": {}} for i in range(batch)], upperbound)


class MatrixProducts(TorchDispatchMode):
    """Records every matrix product of the enclosed code as (function, operands of that shape and layout).

    Attention counts as its products: two forward, four backward (what its kernel recomputes is not counted).
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Tensor], tuple[tuple, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is aten.mm.default:
            self._add(torch.mm, *args)
        elif func is aten.addmm.default:
            self._add(torch.mm, *args[1:])
        elif func is aten.bmm.default:
            self._add(torch.bmm, *args)
        elif func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            self._attention(*args[:3], backward=False)
        elif func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            self._attention(*args[1:4], backward=True)
        return func(*args, **(kwargs or {}))

    def _add(self, function: Callable[..., Tensor], *operands: Tensor) -> None:
        self.calls.append((function, tuple((tuple(t.shape), t.stride()) for t in operands)))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, backward: bool) -> None:
        n, h, length, d = q.shape
        q, weights = torch.empty(n * h, length, d), torch.empty(n * h, length, length)
        if not backward:
            self._add(torch.bmm, q, q.transpose(1, 2))
            self._add(torch.bmm, weights, q)
        else:
            self._add(torch.bmm, weights.transpose(1, 2), q)  # dV
            self._add(torch.bmm, q, q.transpose(1, 2))  # dP
            self._add(torch.bmm, weights, q)  # dQ
            self._add(torch.bmm, weights.transpose(1, 2), q)  # dK

    def replay(self) -> Callable[[], None]:
        """A function that computes them all, one after another."""
        operands: dict[tuple, Tensor] = {}

        def tensor(shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
            if (shape, stride) not in operands:
                operands[shape, stride] = torch.empty_strided(shape, stride).normal_()
            return operands[shape, stride]

        prepared = [(f, [tensor(*layout) for layout in layouts]) for f, layouts in self.calls]

        def run() -> None:
            for function, tensors in prepared:
                function(*tensors)

        return run


def best_of(rounds: int, **variants: Callable[[], object]) -> dict[str, float]:
    """Best time of each, alternating."""
    times = dict.fromkeys(variants, float("inf"))
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name] = min(times[name], time.perf_counter() - start)
    return times


def separate_pass(setup: Setup) -> Callable[[], None]:
    """Student forward and backward with one backbone pass per crop size."""

    def run() -> None:
        backbone, b = setup.model.student["backbone"], setup.batch
        big = backbone(b["collated_global_crops"], b["collated_masks"], is_training=True)
        small = backbone(b["collated_local_crops"], is_training=True)
        (big["x_norm_clstoken"].sum() + small["x_norm_clstoken"].sum()).backward()

    return run


def packed_pass(setup: Setup) -> Callable[[], None]:
    """The same in one packed pass."""

    def run() -> None:
        backbone, b = setup.model.student["backbone"], setup.batch
        crops = [b["collated_global_crops"], b["collated_local_crops"]]
        big, small = backbone(crops, [b["collated_masks"], None], is_training=True)
        (big["x_norm_clstoken"].sum() + small["x_norm_clstoken"].sum()).backward()

    return run


def full_depth(setup: Setup) -> Setup:
    """Stochastic depth that computes every sequence and masks."""
    for block in setup.model.student["backbone"].block_list:
        block.subset_above = 1.0
    return setup


VARIANTS: dict[str, Callable[[list[str]], Callable[[], object]]] = {
    "step": lambda o: Setup(o).step,
    "step_full_depth": lambda o: full_depth(Setup(o)).step,
    "packed": lambda o: packed_pass(Setup(o)),
    "separate": lambda o: separate_pass(Setup(o)),
    "built": lambda o: Setup(o).model.train,
}


def peak_gib(variant: str, overrides: list[str]) -> float:
    """Peak resident memory of a process that runs one variant twice."""
    command = [sys.executable, __file__, "--peak-of", variant, *overrides]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def compare(rounds: int, overrides: list[str]) -> None:
    setup = Setup(overrides)
    setup.step()
    with MatrixProducts() as products:
        setup.step()
    full = full_depth(Setup(overrides))
    variants = {
        "step": setup.step,
        "products": products.replay(),
        "step_full_depth": full.step,
        "packed": packed_pass(setup),
        "separate": separate_pass(setup),
    }
    t = best_of(rounds, **variants)
    memory = {name: peak_gib(name, overrides) for name in VARIANTS}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, best of {rounds} rounds")
    print(f"{'whole step':44} {t['step']:7.2f} s")
    print(f"{'its ' + str(len(products.calls)) + ' matrix products alone':44} {t['products']:7.2f} s")
    print(f"{'share of the step (target 0.80 or more)':44} {t['products'] / t['step']:7.2f}")
    print(f"{'stochastic depth 0.3, all computed':44} {t['step_full_depth']:7.2f} s")
    print(f"{'  against on a subset (ours)':44} {t['step_full_depth'] / t['step']:7.2f} x")
    print(f"{'student passes, one per crop size':44} {t['separate']:7.2f} s")
    print(f"{'  against packed (ours)':44} {t['separate'] / t['packed']:7.2f} x")
    names = {"built": "model and optimiser only", "step": "step", "step_full_depth": "step, full depth"}
    names |= {"packed": "packed passes", "separate": "separate passes"}
    print("peak memory: " + ", ".join(f"{text} {memory[name]:.2f} GiB" for name, text in names.items()))


def scaling(rounds: int, overrides: list[str]) -> None:
    """Seconds per step against local crops, crop size and batch, each alone."""
    print(f"{'what':24} {'value':>6} {'s/step':>8} {'per unit of work':>18}")
    sweeps = {
        "local crops": [(n, [f"crops.local_crops_number={n}"], 4, 2 * 217 + n * 28) for n in (0, 2, 4, 8, 16)],
        "global crop size": [
            (s, [f"crops.global_crops_size={s}"], 4, 2 * ((s // 16) ** 3 + 1) + 8 * 28) for s in (48, 64, 96, 112)
        ],
        "batch": [(b, [], b, b) for b in (1, 2, 4, 8)],
    }
    for what, rows in sweeps.items():
        for value, extra, batch, work in rows:
            setup = Setup([*overrides, *extra], batch)
            setup.step()
            seconds = best_of(rounds, step=setup.step)["step"]
            print(f"{what:24} {value:6} {seconds:8.2f} {1000 * seconds / work:15.2f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scaling", action="store_true", help="cost against crops, tokens and batch")
    parser.add_argument("--small", action="store_true", help="a small network, to see that the benchmark runs")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    overrides = [*(SMALL if args.small else []), *args.overrides]
    if args.peak_of:
        run = VARIANTS[args.peak_of](overrides)
        run()
        run()
        peak_kib = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())  # ru_maxrss starts at the parent's
        print(json.dumps(int(peak_kib[1]) / 2**20))
    elif args.scaling:
        scaling(args.rounds, overrides)
    else:
        compare(args.rounds, overrides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
