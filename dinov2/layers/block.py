"""A pre-norm transformer block whose residual branches are skipped for a random subset of the sequences.

Shapes: T all tokens of a pass, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.layers.attention import Attention, MemEffAttention, Segment
from dinov2.layers.folding import run_branch
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from dinov2.layers.stochastic_depth import Draw, add_rows, draw_subset, drop_mask, kept_rows, mean_keeping_scale, take_rows


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
        self.norm1: nn.Module = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias, attention)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2: nn.Module = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ffn_layer(dim, int(dim * mlp_ratio), bias=ffn_bias)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path = drop_path
        self.subset_above = subset_above

    def forward(self, x: Tensor, segments: list[Segment] | None = None, draws: tuple[Draw, Draw] | None = None) -> Tensor:
        """[T, E] -> [T, E]; `draws` are of `self.draw`, which is called where there are none.

        Without segments, as DINOv2 calls it, [B, N, E] -> [B, N, E]; rotary positions would have to be in the segments.
        """
        if segments is None:
            return self.forward(x.flatten(0, 1), [Segment(*x.shape[:2])], draws).view(x.shape)
        for_attention, for_mlp = self.draw(x, segments) if draws is None else draws
        x = self._add_residual(x, segments, for_attention, lambda t, segs: run_branch(self.attn, self.norm1, self.ls1, t, segs))
        return self._add_residual(x, segments, for_mlp, lambda t, _: run_branch(self.mlp, self.norm2, self.ls2, t))

    def draw(self, x: Tensor, segments: list[Segment]) -> tuple[Draw, Draw]:
        """What the attention and the MLP branch of one pass are computed for; draws from torch's generator."""
        if not self.training or self.drop_path == 0.0:
            return None, None
        if self.drop_path <= self.subset_above:
            return drop_mask(x, segments, self.drop_path), drop_mask(x, segments, self.drop_path)
        return draw_subset(segments, self.drop_path, x.device), draw_subset(segments, self.drop_path, x.device)

    def _add_residual(
        self, x: Tensor, segments: list[Segment], draw: Draw, branch: Callable[[Tensor, list[Segment]], Tensor]
    ) -> Tensor:
        # the sum stays in the dtype of `x`: under autocast in the half precision of the first product, in both networks
        if draw is None:
            return x + branch(x, segments).to(x.dtype)
        if isinstance(draw, Tensor):
            return x + (branch(x, segments) * draw).to(x.dtype)
        rows, place, kept = kept_rows(draw, segments)
        residual = branch(take_rows(x, rows, place), kept)
        return add_rows(x, residual * mean_keeping_scale(segments, kept, residual), rows, place)


class NestedTensorBlock(Block):
    """DINOv2's name and arguments of `Block`, called with [B, N, E] or with a list of such, which is one pass."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        attn_class: type[nn.Module] = Attention,
        ffn_layer: Callable[..., nn.Module] = Mlp,
    ) -> None:
        if drop or attn_drop or act_layer is not nn.GELU or attn_class not in (Attention, MemEffAttention):
            raise NotImplementedError(
                "NestedTensorBlock: dropout, another activation than GELU and another attention are not part of this package, "
                "nor of the published networks: leave drop, attn_drop, act_layer and attn_class as they are"
            )
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias, proj_bias, ffn_bias, drop_path, init_values or None, ffn_layer)
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)

    def forward(self, x: Any, segments: list[Segment] | None = None, draws: tuple[Draw, Draw] | None = None) -> Any:
        """A tensor as of `Block`, or a list of [B, N, E] -> the same list."""
        if not isinstance(x, list):
            return super().forward(x, segments, draws)
        each = [Segment(*t.shape[:2]) for t in x]
        packed = super().forward(torch.cat([t.flatten(0, 1) for t in x]), each, draws)
        return [rows.view(t.shape) for rows, t in zip(packed.split([s.num_rows for s in each]), x, strict=True)]
