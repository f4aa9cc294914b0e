"""Stochastic depth on packed sequences: what is drawn, and how the kept rows leave the token matrix and come back.

Draws are made outside the blocks, so that a compiled block draws nothing and sees shapes that are the same at every step.

Shapes: T all tokens of a pass, R rows of the kept sequences, n sequences of a segment, N tokens a sequence, E embedding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2.layers.attention import Segment


class Subset(NamedTuple):
    """The sequences that a residual branch is computed for, segment by segment.

    order: [n] permutations; the first ones of each are kept.
    place: [n] where each sequence stands in `order`.
    num_kept: how many are kept.
    """

    order: list[Tensor]
    place: list[Tensor]
    num_kept: list[int]


Draw = Subset | Tensor | None  # the kept sequences; or a factor for every row, [T, 1]; or nothing is dropped


def num_kept(seg: Segment, rate: float) -> int:
    """Sequences of a segment that a branch is computed for."""
    return max(1, int(seg.num_sequences * (1 - rate)))


def draw_subset(segments: list[Segment], rate: float, device: torch.device) -> Subset:
    """A random subset of the sequences; every segment keeps `max(1, int(n * (1 - rate)))` of its n."""
    order = [torch.randperm(seg.num_sequences, device=device) for seg in segments]
    place = [torch.empty_like(o).scatter_(0, o, torch.arange(len(o), device=device)) for o in order]  # the inverse, unsorted
    return Subset(order, place, [num_kept(seg, rate) for seg in segments])


def drop_mask(x: Tensor, segments: list[Segment], rate: float) -> Tensor:
    """[T, 1]: 0 for the rows of dropped sequences, 1 / (1 - rate) for the others, drawn per sequence."""
    masks = []
    for seg in segments:
        keep = torch.rand(seg.num_sequences, device=x.device) >= rate
        masks.append((keep.to(x.dtype) / (1 - rate)).repeat_interleave(seg.length))
    return torch.cat(masks)[:, None]


def kept_rows(subset: Subset, segments: list[Segment]) -> tuple[Tensor, Tensor, list[Segment]]:
    """Rows of the kept sequences [R], where each of all rows stands among them or -1 [T], and the kept segments."""
    rows, places, kept, start, start_kept = [], [], [], 0, 0
    for seg, order, place, count in zip(segments, *subset, strict=True):
        token = torch.arange(seg.length, device=order.device)
        rows.append((start + order[:count, None] * seg.length + token).flatten())
        places.append(torch.where(place[:, None] < count, start_kept + place[:, None] * seg.length + token, -1).flatten())
        kept.append(Segment(count, seg.length, seg.rotary))
        start += seg.num_sequences * seg.length
        start_kept += count * seg.length
    return torch.cat(rows), torch.cat(places), kept


def mean_keeping_scale(segments: list[Segment], kept: list[Segment], like: Tensor) -> Tensor | float:
    """The factor n / kept of a row's segment, which keeps the mean: one number, or [R, 1] where segments differ."""
    scale = [seg.num_sequences / k.num_sequences for seg, k in zip(segments, kept, strict=True)]
    if len(set(scale)) == 1:
        return scale[0]
    return torch.cat([like.new_full((k.num_rows, 1), s) for k, s in zip(kept, scale, strict=True)])


def take_rows(x: Tensor, rows: Tensor, place: Tensor) -> Tensor:
    """[T, E] -> [R, E], for rows that are named once each; the gradient is a gather or a copy, never an addition."""
    return _Take.apply(x, rows, place)


def add_rows(x: Tensor, part: Tensor, rows: Tensor, place: Tensor) -> Tensor:
    """[T, E] with [R, E] added to the rows that are named, once each; in the dtype of `x`."""
    return _Add.apply(x, part, rows, place)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(rows, place)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, place = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return _spread(grad, place), None, None
        return grad.new_zeros(len(place), grad.shape[1]).index_copy_(0, rows, grad), None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Tensor, rows: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.part_dtype = part.dtype
        if torch.compiler.is_compiling():
            return x + _spread(part, place).to(x.dtype)
        return x.index_copy(0, rows, x.index_select(0, rows).add_(part.to(x.dtype)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return grad, grad.index_select(0, ctx.saved_tensors[0]).to(ctx.part_dtype), None, None


def _spread(part: Tensor, place: Tensor) -> Tensor:
    """[R, E] -> [T, E] by the inverse index, 0 elsewhere: as a gather, which a compiler joins with what is around it."""
    return torch.where(place[:, None] >= 0, part.index_select(0, place.clamp_min(0)), 0.0)
