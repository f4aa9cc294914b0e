"""Ranks and collectives that are also right in one process without a process group."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2.errors import LostRank

T = TypeVar("T")
ALIVE_PERIOD_S = 10.0  # between two signs of life to ranks that wait


def is_enabled() -> bool:
    """Whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def get_global_rank() -> int:
    return dist.get_rank() if is_enabled() else 0


def get_global_size() -> int:
    return dist.get_world_size() if is_enabled() else 1


def is_main_process() -> bool:
    return get_global_rank() == 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks (`x` itself in one process); for values without a gradient."""
    if is_enabled():
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_reduce_max(x: Tensor) -> Tensor:
    """The maximum of `x` over all ranks (`x` itself in one process); for values without a gradient."""
    if is_enabled():
        x = x.clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether the flag is set on any rank; every rank gets the same answer."""
    if not is_enabled():
        return flag
    return bool(all_reduce_max(torch.tensor(float(flag), device=device)))


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each value's mean over ranks that have the same names, in float64."""
    if not is_enabled():
        return values
    stacked = all_reduce_sum(torch.stack([v.double() for v in values.values()])) / get_global_size()
    return dict(zip(values, stacked.unbind(), strict=True))


def barrier() -> None:
    """Wait for all ranks."""
    if is_enabled():
        dist.barrier()


def while_others_wait(work: Callable[[Callable[[], None]], T]) -> T:
    """Let the main rank alone do something while the others wait, though it takes longer than a collective may.

    Args:
        work: Called on the main rank with a function that it has to call now and then, which tells the others to go on waiting.

    Returns:
        What `work` did, on every rank.

    Raises:
        LostRank: On the other ranks, where `work` has raised on the main one.
    """
    if not is_enabled():
        return work(lambda: None)
    if not is_main_process():
        while (told := _from_main(None)) is None:
            pass
        if not told:
            raise LostRank(f"rank {get_global_rank()}: rank 0 has ended; its own message says why")
        result: T = told[0]
        return result
    last = time.monotonic()

    def alive() -> None:
        nonlocal last
        if time.monotonic() - last > ALIVE_PERIOD_S:
            _from_main(None)
            last = time.monotonic()

    done: list[T] = []
    try:
        done.append(work(alive))
    finally:
        _from_main(done)
    return done[0]


def _from_main(obj: Any) -> Any:
    """The main rank's object."""
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(obj: Any) -> list[Any]:
    """Every rank's object, in rank order."""
    if not is_enabled():
        return [obj]
    gathered: list[Any] = [None] * get_global_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def gather_rows(x: Tensor) -> Tensor:
    """[n, ...] of every rank -> [ranks * n, ...], in rank order; the same n everywhere; without a gradient."""
    if not is_enabled():
        return x
    out = x.new_empty(get_global_size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.num_rows = x.shape[0]
        return gather_rows(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        first = get_global_rank() * ctx.num_rows
        return all_reduce_sum(grad)[first : first + ctx.num_rows]


def gather_rows_with_grad(x: Tensor) -> Tensor:
    """As `gather_rows`; the gradient of a row is the sum of what all ranks' losses make of it."""
    return _GatherRows.apply(x) if is_enabled() else x


def global_count(n: int, like: Tensor) -> Tensor:
    """The sum of a rank's count over all ranks, as a tensor of `like`'s dtype and device."""
    return all_reduce_sum(like.new_full((), n))  # filled on the device: a copy from the host would wait for it
