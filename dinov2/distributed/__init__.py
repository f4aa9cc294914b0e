"""Ranks and collectives that are also right in one process without a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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


def global_count(n: int, like: Tensor) -> Tensor:
    """The sum of a rank's count over all ranks, as a tensor of `like`'s dtype and device."""
    return all_reduce_sum(torch.tensor(float(n), dtype=like.dtype, device=like.device))
