"""A pre-norm transformer block whose residual branches are skipped for a random subset of the sequences.

Shapes: T all tokens of a pass, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dinov2.layers.attention import Attention, Segment
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
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias, attention)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ffn_layer(dim, int(dim * mlp_ratio), bias=ffn_bias)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path = drop_path
        self.subset_above = subset_above

    def forward(self, x: Tensor, segments: list[Segment], draws: tuple[Draw, Draw] | None = None) -> Tensor:
        """[T, E] -> [T, E]; `draws` are of `self.draw`, which is called where there are none."""
        for_attention, for_mlp = self.draw(x, segments) if draws is None else draws
        x = self._add_residual(x, segments, for_attention, lambda t, segs: self.ls1(self.attn(self.norm1(t), segs)))
        return self._add_residual(x, segments, for_mlp, lambda t, _: self.ls2(self.mlp(self.norm2(t))))

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
