"""Arguments of deformable attention for the tests, and which compiled operators were called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Size3 = tuple[int, int, int]
Arguments = tuple[Tensor, list[Size3], Tensor, Tensor]

SHAPES: list[Size3] = [(5, 4, 3), (2, 3, 4)]


def make_arguments(
    batch: int = 2,
    shapes: list[Size3] = SHAPES,
    queries: int = 6,
    heads: int = 2,
    channels: int = 5,
    points: int = 3,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> Arguments:
    """Value, spatial_shapes, locations (some outside, none within 1e-3 voxels of a centre) and weights, gradients wanted."""
    generator = torch.Generator().manual_seed(seed)
    num_voxels = sum(h * w * d for h, w, d in shapes)
    value = torch.randn(batch, num_voxels, heads, channels, generator=generator, dtype=torch.float64)
    coordinates = torch.rand(batch, queries, heads, len(shapes), points, 3, generator=generator, dtype=torch.float64)
    sizes = torch.tensor(shapes, dtype=torch.float64)[:, None]  # [L, 1, 3]
    coordinates = coordinates * (sizes + 3) - 2  # voxels, from outside to outside
    fraction = (coordinates - coordinates.floor()).clamp(1e-3, 1 - 1e-3)
    locations = (coordinates.floor() + fraction + 0.5) / sizes
    weights = torch.rand(locations.shape[:-1], generator=generator, dtype=torch.float64)
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    value, locations, weights = value.to(device, dtype), locations.to(device, sum_dtype), weights.to(device, sum_dtype)
    return value.requires_grad_(), shapes, locations.requires_grad_(), weights.requires_grad_()


def tensors(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    return arguments[0], arguments[2], arguments[3]


def gradients(out: Tensor, arguments: Arguments, seed: int = 1) -> tuple[Tensor, ...]:
    """Of value, locations and weights, for a random gradient of the output."""
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out)
    return torch.autograd.grad(out, tensors(arguments), grad)


class CalledOperators(TorchDispatchMode):
    """Names of this package's compiled operators that the enclosed code calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "dinov2":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
