"""A pre-norm transformer block whose residual branches are skipped for a random subset of the sequences.

Shapes: T all tokens of a pass, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinov2.layers.attention import Attention, Segment
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp


class Block(nn.Module):
    """Attention and MLP with LayerScale and stochastic depth; parameter names are DINOv2's.

    With a drop rate above `subset_above` the branch is computed for the kept sequences only (cheaper, and what DINOv2
    does above 0.1); below it every sequence is computed and a random mask is applied.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop_path: float = 0.0,
        init_values: float | None = None,
        ffn_layer: Callable[..., nn.Module] = Mlp,
        attention: str = "sdpa",
        subset_above: float = 0.1,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias, attention)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ffn_layer(dim, int(dim * mlp_ratio), bias=ffn_bias)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path = drop_path
        self.subset_above = subset_above

    def forward(self, x: Tensor, segments: list[Segment]) -> Tensor:
        """[T, E] -> [T, E]."""
        x = self._add_residual(x, segments, lambda t, segs: self.ls1(self.attn(self.norm1(t), segs)))
        return self._add_residual(x, segments, lambda t, segs: self.ls2(self.mlp(self.norm2(t))))

    def _add_residual(self, x: Tensor, segments: list[Segment], branch: Callable[[Tensor, list[Segment]], Tensor]) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return x + branch(x, segments)
        if self.drop_path <= self.subset_above:
            return x + branch(x, segments) * drop_mask(x, segments, self.drop_path)
        rows, kept, scale = draw_subset(segments, self.drop_path, x.device)
        residual = branch(x.index_select(0, rows), kept)
        if len(set(scale)) > 1:  # subset sizes are whole numbers, so the exact scale can differ by segment
            per_row = [residual.new_full((seg.num_rows, 1), s) for seg, s in zip(kept, scale, strict=True)]
            return x.index_add(0, rows, (residual * torch.cat(per_row)).to(x.dtype))
        return x.index_add(0, rows, residual.to(x.dtype), alpha=scale[0])


def draw_subset(segments: list[Segment], rate: float, device: torch.device) -> tuple[Tensor, list[Segment], list[float]]:
    """Rows of a random subset of the sequences, its segments, and the factor per segment that keeps the mean.

    Every segment keeps `max(1, int(n * (1 - rate)))` of its n sequences.
    """
    rows, kept, scale, start = [], [], [], 0
    for seg in segments:
        num_kept = max(1, int(seg.num_sequences * (1 - rate)))
        chosen = torch.randperm(seg.num_sequences, device=device)[:num_kept]
        rows.append((start + chosen[:, None] * seg.length + torch.arange(seg.length, device=device)).flatten())
        kept.append(seg._replace(num_sequences=num_kept))
        scale.append(seg.num_sequences / num_kept)
        start += seg.num_rows
    return torch.cat(rows), kept, scale


def drop_mask(x: Tensor, segments: list[Segment], rate: float) -> Tensor:
    """[T, 1]: 0 for the rows of dropped sequences, 1 / (1 - rate) for the others, drawn per sequence."""
    masks = []
    for seg in segments:
        keep = torch.rand(seg.num_sequences, device=x.device) >= rate
        masks.append((keep.to(x.dtype) / (1 - rate)).repeat_interleave(seg.length))
    return torch.cat(masks)[:, None]
