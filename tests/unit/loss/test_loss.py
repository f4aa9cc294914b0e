"""Losses and targets as theorems: what must hold for any scores, in any precision, for any number of processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters

from dinov2.loss import (
    TeacherCenter,
    compiled_row_math,
    cross_entropy,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
)
from tests.started import in_ranks

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def scores(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distributions(*shape: int, seed: int = 1) -> Tensor:
    return torch.softmax(3 * scores(*shape, seed=seed), -1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinkhorn_rows_sum_to_one_and_prototypes_are_used_equally(dtype: torch.dtype) -> None:
    q = sinkhorn_knopp(scores(12, 7, dtype=dtype), temp=0.5, num_iters=50)
    assert q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(q.sum(1), torch.ones(12, dtype=q.dtype))
    torch.testing.assert_close(q.sum(0), torch.full((7,), 12 / 7, dtype=q.dtype), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sinkhorn_stays_finite_for_scores_that_overflow_an_exponential(dtype: torch.dtype) -> None:
    q = sinkhorn_knopp(20 * scores(6, 5, dtype=dtype), temp=0.04)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(6))


def test_sinkhorn_of_no_rows_is_empty() -> None:
    assert sinkhorn_knopp(torch.empty(0, 5), 0.1).shape == (0, 5)


def test_cross_entropy_is_the_textbook_one() -> None:
    s, t = scores(3, 9), distributions(3, 9)
    expected = -(t * torch.log_softmax(s / 0.1, -1)).sum(-1)
    torch.testing.assert_close(cross_entropy(s, t), expected)
    assert float(cross_entropy(torch.zeros(1, 9), torch.full((1, 9), 1 / 9))) == pytest.approx(math.log(9))


def test_sinkhorn_is_the_textbook_one() -> None:
    """Rounds of dividing by the sums of prototypes, then of rows; in float32 near it for peaked scores too."""
    s = torch.tanh(scores(40, 30))  # as the head's, in [-1, 1]
    q = torch.exp(s / 0.04)
    for _ in range(3):
        q = q / (q.sum(0) * 30)
        q = q / (q.sum(1, keepdim=True) * 40)
    torch.testing.assert_close(sinkhorn_knopp(s, 0.04), q * 40, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(sinkhorn_knopp(s.float(), 0.04).double(), q * 40, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_the_cross_entropy_is_exact_and_kept_once_in_the_dtype_of_the_scores() -> None:
    s, t = scores(3, 2, 9).requires_grad_(), distributions(1, 2, 9)
    weight = scores(3, 2, seed=5)
    (expected,) = torch.autograd.grad((-(t * torch.log_softmax(s / 0.1, -1)).sum(-1) * weight).sum(), s)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        cross_entropy(s, t)
    assert [x.dtype for x in kept] == [s.dtype]
    loss = (cross_entropy(s, t) * weight).sum()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(s.grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # it was scaled in place
        loss.backward()


def test_gradients_of_half_precision_scores_do_not_vanish_before_the_loss_scale() -> None:
    """A row's weight of 1e-5 alone would leave nothing of most entries in fp16; the scale comes with the backward pass."""
    s, t = scores(4, 512, dtype=torch.float16).requires_grad_(), distributions(4, 512)
    (cross_entropy(s, t.float()).sum() * 1e-5 * 65536).backward()
    exact = s.detach().double().requires_grad_()
    (cross_entropy(exact, t).sum() * 1e-5 * 65536).backward()
    error = (s.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert s.grad.dtype == torch.float16 and float(error) < 2e-3


def test_compiled_row_math_takes_any_number_of_rows_without_compiling_again() -> None:
    torch._dynamo.reset()
    counters.clear()
    math = compiled_row_math("aot_eager")
    for i, rows in enumerate((5, 9, 13, 1, 0)):
        s, t = scores(rows, 16, seed=rows).requires_grad_(), sinkhorn_knopp(scores(rows, 16, seed=2), 0.05 + 0.01 * i)
        torch.testing.assert_close(sinkhorn_knopp(scores(rows, 16, seed=2), 0.05 + 0.01 * i, math=math), t)
        (plain,) = torch.autograd.grad(cross_entropy(s, t).sum(), s)
        (fast,) = torch.autograd.grad(cross_entropy(s, t, math=math).sum(), s)
        torch.testing.assert_close(fast, plain)
        assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


def test_dino_sums_over_pairs_and_can_skip_a_crop_with_itself() -> None:
    s, t = scores(3, 4, 6), distributions(2, 4, 6)
    pairs = sum(cross_entropy(a, b).mean() for a in s for b in t)
    torch.testing.assert_close(dino_loss(s, t), pairs)
    swapped = cross_entropy(s[0], t[1]).mean() + cross_entropy(s[1], t[0]).mean()
    torch.testing.assert_close(dino_loss(s[:2], t, skip_same_crop=True), swapped)
    assert float(dino_loss(torch.empty(0, 4, 6), t)) == 0.0


def test_ibot_averages_within_a_crop_then_over_crops() -> None:
    s, t = scores(5, 6), distributions(5, 6)
    weight = torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])
    loss, mean = ibot_loss(s, t, weight, num_rows=4)
    h = cross_entropy(s, t)
    torch.testing.assert_close(loss, (h[:2].mean() + h[2:].mean()) / 4)
    torch.testing.assert_close(mean, h.mean())
    nothing, zero = ibot_loss(s[:0], t[:0], weight[:0], num_rows=4)
    assert float(nothing) == 0.0 and float(zero) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_koleo_computes_in_at_least_fp32(dtype: torch.dtype) -> None:
    x = scores(9, 16, dtype=dtype)
    loss = koleo_loss(x)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    distance = torch.cdist(unit, unit).fill_diagonal_(torch.inf).min(1).values
    assert float(loss) == pytest.approx(float(-distance.log().mean()), rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(koleo_loss(x), loss)
    assert float(koleo_loss(x[:1])) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_finite_in_every_precision(dtype: torch.dtype) -> None:
    s = scores(2, 4, 6, dtype=dtype).requires_grad_()
    x = scores(4, 8, seed=3, dtype=dtype).requires_grad_()
    t = sinkhorn_knopp(scores(8, 6, seed=4, dtype=dtype), 0.05).view(2, 4, 6)
    (dino_loss(s, t) + koleo_loss(x)).backward()
    assert s.grad.dtype == dtype and s.grad.isfinite().all() and x.grad.isfinite().all()


def test_the_centre_moves_at_its_next_use() -> None:
    center = TeacherCenter(4)
    batch = torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 1.0, 0.0]])
    first = center(batch, 0.1)
    torch.testing.assert_close(first, torch.softmax(batch / 0.1, -1))
    assert center.center.abs().sum() == 0
    second = center(batch, 0.1)
    torch.testing.assert_close(center.center, 0.1 * batch.mean(0, keepdim=True))
    torch.testing.assert_close(second, torch.softmax((batch - 0.1 * batch.mean(0)) / 0.1, -1))


def test_a_non_finite_batch_leaves_no_trace_in_the_centre() -> None:
    center = TeacherCenter(3)
    center(torch.full((2, 3), torch.nan), 0.1)
    center(torch.zeros(2, 3), 0.1)
    assert center.center.isfinite().all()


def _targets_of_a_rank(rank: int, folder: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rows = scores(9, 5)
    mine = rows[:6] if rank == 0 else rows[6:]  # ranks hold different numbers of masked patches
    center = TeacherCenter(5).double()
    center(mine, 0.2)
    out = {"sinkhorn": sinkhorn_knopp(mine, 0.2), "centering": center(mine, 0.2)}
    torch.save(out, f"{result}.{rank}")
    dist.destroy_process_group()


def test_two_processes_make_the_targets_of_one(tmp_path: Path) -> None:
    in_ranks(_targets_of_a_rank, str(tmp_path), str(tmp_path / "out"))
    parts = [torch.load(tmp_path / f"out.{r}") for r in range(2)]
    rows = scores(9, 5)
    center = TeacherCenter(5).double()
    center(rows, 0.2)
    for name, alone in (("sinkhorn", sinkhorn_knopp(rows, 0.2)), ("centering", center(rows, 0.2))):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), alone, rtol=1e-12, atol=1e-14)
