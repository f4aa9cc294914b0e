"""torch.compile, block by block: where it is used, what is said of it, and what happens where it fails."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch._functorch.config
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dinov2.configs.schema import memory_budget
from dinov2.distributed import any_rank, is_enabled
from dinov2.distributed.precision import HALF, autocast, training_dtype
from dinov2.distributed.runtime import Runtime
from dinov2.layers import Block, Segment
from dinov2.loss.row_math import PLAIN, compiled_row_math
from dinov2.train.meta_arch import MetaArch

logger = logging.getLogger(__name__)

T = TypeVar("T")
BACKEND = "inductor"
# what Dynamo, Inductor, Triton and the compilers behind them raise where they meet something they cannot do
_FAILURES = (
    RuntimeError,
    OSError,
    ImportError,
    AttributeError,
    TypeError,
    AssertionError,
    LookupError,
    subprocess.SubprocessError,
)


def resolve_compile(choice: bool | str, device_type: str) -> bool:
    """Whether `train.compile` asks for what this machine has: `auto` is on for CUDA with Triton, off on a CPU."""
    is_cpu = device_type == "cpu"
    has_compiler = bool(shutil.which(os.environ.get("CXX", "g++")) if is_cpu else importlib.util.find_spec("triton"))
    wanted = not is_cpu if choice == "auto" else bool(choice)
    if wanted and not has_compiler:
        logger.warning("train.compile has no effect: %s was not found", "a C++ compiler" if is_cpu else "triton")
    return wanted and has_compiler


def trial(device: torch.device, dtype: torch.dtype) -> str:
    """What goes wrong where a small block is compiled, which has other gradients than it should too; empty for nothing.

    A release of torch was seen that compiles wrong gradients of correct code without a word.

    Args:
        device: Where.
        dtype: What products are computed in; half precisions under autocast.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        block, segments = Block(32, 2, drop_path=0.5, init_values=0.5).to(device), [Segment(8, 5), Segment(12, 2)]
        x = torch.randn(sum(s.num_rows for s in segments), 32, device=device)
        draws = block.draw(x, segments)

    def gradients() -> tuple[Tensor, ...]:
        rows = x.clone().requires_grad_()
        with autocast(device.type, dtype):
            out = block(rows, segments, draws)
        return torch.autograd.grad((out * x.sin()).sum(), [rows, *block.parameters()])

    plain = gradients()
    compile_block(block)
    try:
        compiled = gradients()
    except _FAILURES as err:
        return _one_line(err)
    off = max(((a - b).norm() / a.norm()).item() for a, b in zip(plain, compiled, strict=True))
    return "" if off <= (0.05 if dtype in HALF else 0.01) else f"its gradients are off by {off:.1%}"


def _one_line(err: BaseException) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {' '.join(lines)[:200]}"


def compile_as_configured(model: MetaArch, cfg: DictConfig, runtime: Runtime) -> None:
    """Compile a model by `train.compile`, before it is spread over ranks."""
    budget = memory_budget(cfg.train.activation_checkpointing)
    if _can_compile(cfg, runtime):
        compile_model(model, 1.0 if budget is None else budget)
    elif budget is not None:
        logger.warning("train.activation_checkpointing=budget has no effect without train.compile: use full")


def _can_compile(cfg: DictConfig, runtime: Runtime) -> bool:
    """Whether it is asked for and a trial goes well on every rank: what failed on one later would leave the others waiting."""
    device = runtime.device
    asked = resolve_compile(cfg.train.compile, device.type)
    dtype = training_dtype(cfg.compute_precision.student.backbone, device.type)
    start = time.perf_counter()
    problem = trial(device, dtype) if asked else "not asked for, or without a compiler"
    if asked:
        logger.info("compiled a small block to see: %.0f s", time.perf_counter() - start)
    somewhere = any_rank(bool(problem), device)
    if asked and somewhere:
        logger.warning("train.compile has no effect: compiling failed (%s)", problem or "on another rank")
    return not somewhere


def compile_block(block: nn.Module, dynamic: bool | None = False) -> None:
    """Compile a block's `forward` and nothing around it: hooks (FSDP), names and checkpoints stay as they are."""
    block.forward = torch.compile(block.forward, dynamic=dynamic, backend=BACKEND)


def compile_model(model: MetaArch, memory_budget: float = 1.0) -> None:
    """Compile each block of both networks, and the row-wise part of the heads; it happens in the first step.

    Equal blocks share what is compiled. `memory_budget` is the share of what a block would keep for the backward pass that it
    may keep; the compiler chooses what is cheapest to compute again.
    """
    torch._dynamo.reset()  # what an earlier model compiled may have had another budget
    torch._functorch.config.activation_memory_budget = memory_budget
    torch._dynamo.config.optimize_ddp = False  # it would cut a block at gradient buckets, and knows no autograd functions
    for side in (model.student, model.teacher):
        blocks = side.backbone.block_list
        has_one_shape = len({block.drop_path for block in blocks}) == 1  # else the kept rows of every block are others
        for block in blocks:
            compile_block(block, dynamic=False if has_one_shape else None)
    model.row_math = compiled_row_math(BACKEND)
    model.compile_state = "untried"


def leave_uncompiled(model: MetaArch) -> None:
    """Undo `compile_model`."""
    for side in (model.student, model.teacher):
        for block in side.backbone.block_list:
            block.__dict__.pop("forward", None)
    model.row_math = PLAIN
    model.compile_state = "off"


def first_compiled(model: MetaArch, step: Callable[[], T]) -> T:
    """Run `step`, a forward and backward pass; of the first compiled one say how long it took.

    Where that fails, which is said once, blocks go on uncompiled and `step` runs again, with the same draws. With several ranks
    the error stays one.
    """
    if model.compile_state != "untried":
        return step()
    start, seed, graphs = time.perf_counter(), torch.initial_seed(), counters["stats"]["unique_graphs"]
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        result = step()
        _wait_for(next(model.parameters()).device)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as err:
        if is_enabled():
            raise
        logger.warning("train.compile has no effect: compiling failed (%s)", _one_line(err))
    else:
        model.compile_state = "on"
        what = "compiled: %d graphs, %.0f s for the first step"
        logger.info(what, counters["stats"]["unique_graphs"] - graphs, time.perf_counter() - start)
        return result
    leave_uncompiled(model)
    model.zero_grad(set_to_none=True)
    for buffer, before in buffers:
        buffer.copy_(before)
    torch.manual_seed(seed)
    return step()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
