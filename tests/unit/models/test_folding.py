"""Norms and LayerScales folded into a compiled block's weights: the same numbers, and only where that is right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dinov2.layers import Block, Segment, SwiGLUFFN
from dinov2.layers.block import Draw

DIM = 32
SEGMENTS = [Segment(6, 9), Segment(10, 2)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def block_of(dtype: torch.dtype = torch.float64, gamma: float = 0.3, **kwargs: object) -> Block:
    """A block whose norms, scales and biases do not have their first values."""
    torch.manual_seed(0)
    block = Block(DIM, 4, drop_path=0.3, init_values=gamma, **kwargs).to(dtype)
    with torch.no_grad():
        for name, p in block.named_parameters():
            if p.dim() == 1:
                p.copy_(p * (1 + 0.2 * torch.randn_like(p)) if "gamma" in name else p + 0.3 * torch.randn_like(p))
    return block


def passes(block: Block, dtype: torch.dtype) -> dict[str, Tensor]:
    """Result and gradients, of the input and of every parameter."""
    torch.manual_seed(1)
    x = torch.randn(sum(s.num_rows for s in SEGMENTS), DIM, dtype=dtype).requires_grad_()
    draws: tuple[Draw, Draw] = block.draw(x, SEGMENTS)
    out = block(x, SEGMENTS, draws)
    (out * torch.randn_like(out)).sum().backward()
    found = {"out": out.detach(), "x": x.grad, **{n: p.grad for n, p in block.named_parameters()}}
    block.zero_grad()
    return found


def compiled(block: Block) -> Block:
    block.forward = torch.compile(block.forward, dynamic=False, backend="aot_eager", fullgraph=True)
    return block


@pytest.mark.parametrize(
    "kwargs", [{}, {"ffn_layer": SwiGLUFFN}, {"qkv_bias": False}, {"proj_bias": False, "ffn_bias": False}], ids=str
)
def test_a_compiled_block_computes_the_same(kwargs: dict[str, object]) -> None:
    block = block_of(**kwargs)
    plain, folded = passes(block, torch.float64), passes(compiled(block), torch.float64)
    for name, value in plain.items():
        torch.testing.assert_close(folded[name], value, rtol=1e-9, atol=1e-11, msg=name)
    assert any(not torch.equal(folded[name], plain[name]) for name in plain)  # another order of the same sums: it was folded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_no_more_than_without(dtype: torch.dtype) -> None:
    """LayerScale at its first value: times a weight of float16 it would keep a few bits."""

    def error(found: dict[str, Tensor], name: str) -> float:
        return ((found[name] - exact[name]).norm() / exact[name].norm()).item()

    block = block_of(torch.float32, gamma=1e-5)
    exact = passes(block, torch.float32)
    with torch.autocast("cpu", dtype):
        plain, folded = passes(block, torch.float32), passes(compiled(block), torch.float32)
    for name in set(exact) - {"out", "x"}:  # the residual stream itself hides what so small a scale adds
        assert error(folded, name) <= 1.5 * error(plain, name) + 0.002, name


def test_what_somebody_put_in_a_linear_layers_place_is_called() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.flip(-1)

    block = block_of()
    block.attn.proj = Adapted(DIM, DIM).double()
    plain, folded = passes(block, torch.float64), passes(compiled(block), torch.float64)
    for name, value in plain.items():
        torch.testing.assert_close(folded[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_an_evaluated_block_is_left_as_it_is() -> None:
    block = block_of().eval()
    plain, left = passes(block, torch.float64), passes(compiled(block), torch.float64)
    assert all(torch.equal(left[name], plain[name]) for name in plain)
