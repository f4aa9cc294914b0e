"""3D rotary position encoding: queries and keys turn by angles that grow with the token's place along each axis.

Not in the paper; a choice for small networks (docs/decisions/001-tiny-recipe.md says what is known of it).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RotaryTable(NamedTuple):
    """Cosine and sine of the angles, [N, f] each: three axes with f/3 frequencies."""

    cos: Tensor
    sin: Tensor

    def repeat(self, times: int) -> RotaryTable:
        return RotaryTable(self.cos.repeat(times, 1), self.sin.repeat(times, 1))


def rotary_table(grid_hwd: tuple[int, int, int], head_dim: int, num_prefix: int, like: Tensor) -> RotaryTable:
    """Angles of every token of one sequence.

    Args:
        grid_hwd: Patches along H, W, D.
        head_dim: Channels of a head; `head_dim // 6` frequencies an axis, the channels left over do not turn.
        num_prefix: Class and register tokens in front, which do not turn.
        like: Tensor whose device and (at least float32) dtype the table takes.

    Returns:
        Table of `num_prefix + H*W*D` rows. Frequencies run geometrically from 0.05 pi to 0.6 pi per token step.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    num_freqs = head_dim // 6
    steps = torch.arange(num_freqs, device=like.device, dtype=dtype) / max(num_freqs - 1, 1)
    freqs = math.pi * 0.05 * 12.0**steps
    axes = [torch.arange(n, device=like.device, dtype=dtype) for n in grid_hwd]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    angles = (places[:, :, None] * freqs).flatten(1)  # [H*W*D, 3 * head_dim // 6]
    angles = torch.cat([angles.new_zeros(num_prefix, angles.shape[1]), angles])
    return RotaryTable(angles.cos(), angles.sin())


def centred_periods(count: int, base: float) -> Tensor:
    """Periods of an axis in DINOv3's manner: geometric from 1 up to `base` (left out), an axis being 2 long."""
    return base ** (torch.arange(count) / count)


def centred_table(grid: tuple[int, ...], periods: Tensor, num_prefix: int) -> RotaryTable:
    """Angles in DINOv3's manner: from the patches' centres, each axis running from -1 to 1 whatever its length.

    Args:
        grid: Patches along each axis, two or three.
        periods: [f], the same for every axis; float32 at least is computed in.
        num_prefix: As of `rotary_table`.

    Returns:
        Table of `num_prefix` + N rows and axes * f columns, the first axis' first.
    """
    like: Any = {"device": periods.device, "dtype": torch.promote_types(periods.dtype, torch.float32)}
    axes = [(torch.arange(n, **like) + 0.5) * 2 / n - 1 for n in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)  # [N, axes]
    angles = (2 * math.pi * places[:, :, None] / periods.to(like["dtype"])).flatten(1)
    angles = torch.cat([angles.new_zeros(num_prefix, angles.shape[1]), angles])
    return RotaryTable(angles.cos(), angles.sin())


def rotate(x: Tensor, table: RotaryTable | None) -> Tensor:
    """Turn channel pairs (i, f + i) of [..., N, d]; channels from 2f on, and everything without a table, stay."""
    if table is None:
        return x
    f = table.cos.shape[-1]
    cos, sin = table.cos.to(x.dtype), table.sin.to(x.dtype)
    a, b, rest = x[..., :f], x[..., f : 2 * f], x[..., 2 * f :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
