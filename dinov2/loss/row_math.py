"""What is computed of every (row, prototype): few passes over memory, in plain PyTorch or compiled.

At 65,536 prototypes one [R, K] tensor of a batch of 128 is gigabytes, so that these passes, not products, are what heads cost.

Shapes: R rows (tokens), K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2.distributed.precision import at_least_fp32


def exponentials(scores: Tensor, temp: float | Tensor) -> tuple[Tensor, Tensor]:
    """exp((scores - their row's largest) / temp), [R, K], and the row's largest / temp, [R, 1], in at least float32."""
    x = at_least_fp32(scores) / temp
    row_max = x.amax(1, keepdim=True)
    return x.sub_(row_max).exp_(), row_max


def scaled(q: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`q` with each row and each column multiplied by a factor, [R, 1] and [K]; in place where it can be."""
    return q.mul_(columns).mul_(rows)


def cross_entropy_parts(scores: Tensor, target: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """-sum(target * log_softmax(scores / temp)), [...], and temp times its gradient, [..., K], in the scores' dtype."""
    x = at_least_fp32(scores) / temp
    log_partition, mass = x.logsumexp(-1, keepdim=True), target.sum(-1, keepdim=True)
    loss = (log_partition * mass).squeeze(-1) - (x * target).sum(-1)
    return loss, x.sub_(log_partition).exp_().mul_(mass).sub_(target).to(scores.dtype)


class RowMath(NamedTuple):
    """The functions above, as they are or compiled."""

    exponentials: Callable[[Tensor, float], tuple[Tensor, Tensor]] = exponentials
    scaled: Callable[[Tensor, Tensor, Tensor], Tensor] = scaled
    cross_entropy_parts: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = cross_entropy_parts


PLAIN = RowMath()


def compiled_row_math(backend: str | Callable[..., Any] = "inductor") -> RowMath:
    """Each function as one or two kernels, for any number of rows (masked patches differ at every step)."""
    fast_exponentials = torch.compile(exponentials, backend=backend)
    fast_scaled = torch.compile(scaled, backend=backend)
    fast_parts = torch.compile(cross_entropy_parts, backend=backend)

    def any_rows(*tensors: Tensor) -> bool:
        """Tell the compiler that the number of rows changes; False for one or none, which it would treat as constants."""
        for x in tensors:
            if x.dim() == 2 and len(x) == len(tensors[0]):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return len(tensors[0]) > 1 and tensors[0].numel() > 0

    def exponentials_any(scores: Tensor, temp: float) -> tuple[Tensor, Tensor]:
        as_tensor = torch.full((), temp, dtype=at_least_fp32(scores[:0]).dtype, device=scores.device)  # it changes too
        return fast_exponentials(scores, as_tensor) if any_rows(scores) else exponentials(scores, temp)

    def scaled_any(q: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return (fast_scaled if any_rows(q, rows) else scaled)(q, rows, columns)

    def parts_any(scores: Tensor, target: Tensor, temp: float) -> tuple[Tensor, Tensor]:
        return (fast_parts if any_rows(scores, target) else cross_entropy_parts)(scores, target, temp)

    return RowMath(exponentials_any, scaled_any, parts_any)
