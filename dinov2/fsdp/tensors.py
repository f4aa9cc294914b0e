"""Tensors that may be sharded."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(x: Tensor) -> Tensor:
    """The whole tensor; a collective where it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_part(x: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory; all of it where it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x
