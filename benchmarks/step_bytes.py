"""Bytes that a compiled training step moves and keeps besides its matrix products, counted on a CPU without timing anything.

    python benchmarks/step_bytes.py

Moved, per row, channel and block: what Inductor's kernels of one block read and write, forward and backward (matrix products
and attention left out). Kept, per row of the sequences that stochastic depth keeps: what the forward pass leaves for the
backward pass. Both with and without an activation budget. Per (masked row, prototype): bytes moved by targets and losses.
bf16; the kernels are those for a CPU, a GPU's are joined a little differently.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch._functorch.config
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.utils import detect_fake_mode
from torch._inductor.compile_fx import compile_fx, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._inductor.virtualized import V
from torch.fx import GraphModule

from dinov2.layers import Block, Segment
from dinov2.loss import compiled_row_math, ibot_loss, sinkhorn_knopp

DIM, HEADS = 128, 4
SEGMENTS = [Segment(20, 217), Segment(80, 28)]
ROWS, PROTOTYPES = 301, 2048
MATRIX_VECTOR_PASSES = 6  # of Sinkhorn, over float32
SCALING_PASS = 2 + 2  # of the kept gradient, in the backward pass


class BlockBytes(NamedTuple):
    """Bytes per channel and block."""

    moved: float  # of each row of the batch, whose sequences are dropped by 30 %
    kept: float  # of each row that is not dropped


class KernelBytes:
    """A backend for torch.compile that plans Inductor's kernels and notes their bytes (products and attention left out).

    The graphs then run as they are: nothing is compiled.
    """

    def __init__(self) -> None:
        self.found: list[int] = []
        torch._dynamo.reset()

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable:
        return compile_fx(graph, inputs, inner_compile=self._plan)

    def _plan(self, graph: GraphModule, inputs: list[Tensor], **how: Any) -> Callable:
        fake, planned = detect_fake_mode(inputs), copy.deepcopy(graph)
        with V.set_fake_mode(fake), DebugContext():
            view_to_reshape(planned)
            record_original_output_strides(planned)
            post_grad_passes(planned, False)
            lowered = GraphLowering(planned, inputs, shape_env=fake.shape_env, is_backward=how.get("is_backward", False))
            with V.set_graph_handler(lowered):
                lowered.run(*inputs)
                lowered._update_scheduler()
                nodes = [n for n in lowered.scheduler.nodes if not isinstance(n, ExternKernelSchedulerNode)]
                self.found += [n.get_read_write_buffers_sizes() for n in nodes]
        return make_boxed_func(graph.forward)


def block_bytes(budget: float) -> BlockBytes:
    """One block in bf16 with stochastic depth 0.3, compiled as the training compiles it."""
    torch.manual_seed(0)
    block = Block(DIM, HEADS, drop_path=0.3, init_values=1e-5)
    x = torch.randn(sum(s.num_rows for s in SEGMENTS), DIM, dtype=torch.bfloat16, requires_grad=True)
    draws = block.draw(x, SEGMENTS)
    kept_rows = sum(count * s.length for s, count in zip(SEGMENTS, draws[0].num_kept, strict=True))
    kept: dict[int, int] = {}
    weights = {tuple(p.shape[::order]) for p in block.parameters() for order in (1, -1)}

    def note(saved: Tensor) -> Tensor:
        if tuple(saved.shape) not in weights:  # nor their casts to half precision, which all rows share
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    kernels = KernelBytes()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        forward = torch.compile(block.forward, dynamic=False, backend=kernels)
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            out = forward(x, SEGMENTS, draws)
        out.sum().backward()
    return BlockBytes(sum(kernels.found) / x.numel(), sum(kept.values()) / (kept_rows * DIM))


def head_bytes() -> float:
    """Targets of masked patches, their loss and its gradient, per (row, prototype)."""
    torch.manual_seed(0)
    teacher, student = (torch.randn(ROWS, PROTOTYPES).bfloat16() for _ in range(2))
    kernels = KernelBytes()
    math = compiled_row_math(kernels)
    target = sinkhorn_knopp(teacher, 0.05, math=math)
    ibot_loss(student.requires_grad_(), target, torch.rand(ROWS), 16, math)[0].backward()
    return sum(kernels.found) / (ROWS * PROTOTYPES) + MATRIX_VECTOR_PASSES * 4 + SCALING_PASS


def main() -> int:
    for budget in (1.0, 0.8):
        moved, kept = block_bytes(budget)
        print(
            f"block, activation budget {budget}: {moved:.1f} bytes moved a row and channel, {kept:.1f} kept a row not dropped"
        )
    print(f"heads: {head_bytes():.1f} bytes moved a masked row and prototype")
    return 0


if __name__ == "__main__":
    sys.exit(main())
