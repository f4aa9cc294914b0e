"""3D multi-scale deformable attention: compiled (`csrc/ms_deform_attn_3d/`) where possible, else in plain PyTorch.

# B batch, S voxels of all levels, M heads, C channels of a head, Q queries, L levels, P points
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.geometry import Size3, triple
from dinov2.ops.extension import compiled_operators, implementation

logger = logging.getLogger(__name__)


OUTSIDE = -1.0  # a location more than a voxel outside any volume
MAX_LEVELS = 16  # of csrc/ms_deform_attn_3d/trilinear.h


def ms_deform_attn_3d(
    value: Tensor, spatial_shapes: Sequence[Size3], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Weighted sum of trilinear samples of a pyramid of volumes, per query and head.

    Differentiable once, by value, locations and weights. At a voxel's centre, where the slope jumps, the derivative by the
    location is the one towards larger coordinates. A location that is not finite samples nothing (0, and gradients 0). On the
    CPU the result and the gradients are the same bits for any number of threads; on CUDA the gradient of `value` is summed in
    any order.

    Under autocast nothing is cast but what is below float32: locations and weights count in float32 (keep the locations in
    float32 from the start: half precision cannot tell voxels apart), and sums are float32 for half-precision values.

    Args:
        value: [B, S, M, C], float32, float64, float16 or bfloat16; the voxels of all levels, D fastest, then W, H, level.
        spatial_shapes: (H, W, D) of each level, in voxels; S is the sum of their products.
        sampling_locations: [B, Q, M, L, P, 3], in [0, 1] along (h, w, d); voxel i of n has its centre at (i + 0.5) / n, and
            zeros lie outside.
        attention_weights: [B, Q, M, L, P].

    Returns:
        [B, Q, M * C] in the dtype of `value`.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit together.

    Source: Zhu et al., Deformable DETR (2021), eq. 3, with a third axis.
    """
    dtype = _sum_dtype(value)
    locations, weights = sampling_locations.to(dtype), attention_weights.to(dtype)
    if value.device.type in COMPILED_FOR:
        sizes = _flatten(spatial_shapes)
        check_arguments(value, sizes, locations, weights)  # here, so that a caller's mistake meets no C++ exception
        return torch.ops.dinov2.ms_deform_attn_3d(value, sizes, locations, weights)
    if not torch.compiler.is_compiling():
        _say_reference(value.device.type)
    return ms_deform_attn_3d_reference(value, spatial_shapes, locations, weights)


def ms_deform_attn_3d_reference(
    value: Tensor, spatial_shapes: Sequence[Size3], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same by `grid_sample`, for any device; slower, and larger in memory. See `ms_deform_attn_3d`."""
    dtype = _sum_dtype(value)
    locations, weights = sampling_locations.to(dtype), attention_weights.to(dtype)
    check_arguments(value, _flatten(spatial_shapes), locations, weights)
    b, _, m, c = value.shape
    q, p = locations.shape[1], locations.shape[4]
    finite = torch.where(locations.isfinite().all(-1, keepdim=True), locations, OUTSIDE)
    levels = value.to(dtype).split([h * w * d for h, w, d in spatial_shapes], dim=1)
    out = value.new_zeros(b * m, c, q, dtype=dtype)
    for level, (size, voxels) in enumerate(zip(spatial_shapes, levels, strict=True)):
        volumes = voxels.permute(0, 2, 3, 1).reshape(b * m, c, *size)
        grid = _to_grid(finite[:, :, :, level]).transpose(1, 2).reshape(b * m, q, p, 1, 3)
        samples = _sample(volumes, grid)  # [B*M, C, Q, P]
        level_weights = weights[:, :, :, level].transpose(1, 2).reshape(b * m, 1, q, p)
        out = out + (samples * level_weights).sum(-1)  # [B*M, C, Q]
    return out.view(b, m * c, q).transpose(1, 2).to(value.dtype)  # [B, Q, M*C]


def check_arguments(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> None:
    """What the compiled operators check too, before they are called, for the reference and for tracing.

    Raises:
        ValueError: As of `ms_deform_attn_3d`.
    """
    if value.dim() != 4 or value.shape[2] == 0 or value.shape[3] == 0:
        raise ValueError(f"value must be [B, S, M, C] with heads and channels, got {list(value.shape)}")
    for name, x in (("sampling_locations", locations), ("attention_weights", weights)):
        if x.device != value.device:
            raise ValueError(f"{name} must be on {value.device} as value is, got {x.device}")
    b, s, m, _ = value.shape
    if len(sizes) % 3 or not 3 <= len(sizes) <= 3 * MAX_LEVELS:
        raise ValueError(f"spatial_shapes must hold (H, W, D) of 1 to {MAX_LEVELS} levels, got {len(sizes)} numbers")
    if any(n <= 0 for n in sizes):
        raise ValueError(f"spatial_shapes must be positive, got {list(sizes)}")
    held = sum(h * w * d for h, w, d in zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True))
    if held != s:
        raise ValueError(f"value has S = {s} voxels, spatial_shapes {list(sizes)} hold {held}")
    num_levels = len(sizes) // 3
    if locations.dim() != 6 or (locations.shape[0], *locations.shape[2:4], locations.shape[5]) != (b, m, num_levels, 3):
        expected = f"B = {b}, M = {m}, L = {num_levels}"
        raise ValueError(f"sampling_locations must be [B, Q, M, L, P, 3] with {expected}, got {list(locations.shape)}")
    if weights.shape != locations.shape[:5]:
        leading = list(locations.shape[:5])
        raise ValueError(
            f"attention_weights must be [B, Q, M, L, P] = {leading} as sampling_locations, got {list(weights.shape)}"
        )


@lru_cache
def _say_reference(device_type: str) -> None:
    logger.warning(
        "3D deformable attention on %s runs in plain PyTorch, slower: %s", device_type, implementation(device_type)[1]
    )


def _sum_dtype(value: Tensor) -> torch.dtype:
    if value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"value must be float64, float32, float16 or bfloat16, got {value.dtype}")
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _flatten(spatial_shapes: Sequence[Size3]) -> list[int]:
    if any(len(shape) != 3 for shape in spatial_shapes):
        raise ValueError(f"spatial_shapes must hold (H, W, D) of each level, got {list(spatial_shapes)}")
    return [n for shape in spatial_shapes for n in shape]


def _to_grid(locations: Tensor) -> Tensor:
    """(h, w, d) in [0, 1] to what `grid_sample` takes for a volume [H, W, D]: the reverse order, in [-1, 1]."""
    return 2 * locations.flip(-1) - 1


def _sample(volumes: Tensor, grid: Tensor) -> Tensor:
    """[N, C, H, W, D] at [N, Q, P, 1, 3]: [N, C, Q, P]."""
    if grid.numel() == 0:  # grid_sample refuses it; nothing is sampled, yet all stays differentiable
        return (volumes.flatten(2)[..., :1, None] + grid.sum()).expand(-1, -1, *grid.shape[1:3])
    return F.grid_sample(volumes, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(-1)


def _fake_forward(value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    check_arguments(value, spatial_shapes, locations, weights)
    b, _, m, c = value.shape
    return value.new_empty(b, locations.shape[1], m * c)


def _fake_backward(
    grad_output: Tensor, value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return triple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (value, locations, weights))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    backward = torch.ops.dinov2.ms_deform_attn_3d_backward
    grad_value, grad_locations, grad_weights = backward(grad_output, value, ctx.spatial_shapes, locations, weights)
    return grad_value, None, grad_locations, grad_weights


def _register() -> frozenset[str]:
    """Join these functions to the compiled operators; the devices that have kernels."""
    if not compiled_operators()[0]:
        return frozenset()
    torch.library.register_fake("dinov2::ms_deform_attn_3d", _fake_forward)
    torch.library.register_fake("dinov2::ms_deform_attn_3d_backward", _fake_backward)
    torch.library.register_autograd("dinov2::ms_deform_attn_3d", _backward, setup_context=_save_inputs)
    return frozenset(device for device in ("cpu", "cuda") if implementation(device)[0])


COMPILED_FOR = _register()  # when imported: torch.compile cannot look for files while it traces a function
