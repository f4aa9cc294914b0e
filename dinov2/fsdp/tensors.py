"""Tensors that may be sharded."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(x: Tensor) -> Tensor:
    """The whole tensor; a collective where it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x
