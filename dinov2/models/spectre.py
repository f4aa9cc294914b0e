"""SPECTRE's local 3D ViT as a `Backbone`: this package's blocks, put together by published facts.

# B batch, H W D voxels, h w d cells of 16 cubed, N = h * w * d, E embedding
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.layers import Block, Segment
from dinov2.layers.rope import centred_periods, centred_table
from dinov2.models.backbone import Preparation

PATCH_HWD = (16, 16, 8)  # voxels


class SpectreViT(nn.Module):
    """Its patches are 16 x 16 x 8 voxels; two neighbours along D are averaged, so that cells are cubes of 16.

    Args:
        embed_dim: E (1,080 published).
        depth: Blocks.
        head_dim: Channels of a head (90 published), six times the periods of an axis.
    """

    patch_size, input_size, num_prefix_tokens = 16, 128, 1
    preparation = Preparation((-1000.0, 1000.0), "RAS", "CT")
    licence = "SPECTRE's weights: CC BY-NC-SA (no commercial use)"

    periods: Tensor

    def __init__(self, embed_dim: int = 1080, depth: int = 24, head_dim: int = 90) -> None:
        super().__init__()
        self.embed_dim, self.num_layers = embed_dim, depth
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(1, embed_dim, PATCH_HWD, PATCH_HWD)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("periods", centred_periods(head_dim // 6, 1000.0))
        self.blocks = nn.ModuleList(Block(embed_dim, embed_dim // head_dim, init_values=1.0) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """As of `Backbone`.

        Raises:
            ValueError: `n` names blocks that do not exist, or a side is not a multiple of a cell.
        """
        depth = self.num_layers
        take = list(range(depth - n, depth)) if isinstance(n, int) else [i % depth for i in n]
        if not take or min(take) < 0 or any(s % 16 for s in x.shape[2:]):
            raise ValueError(f"layers {n} of {depth}, volume of {tuple(x.shape[2:])} voxels: sides are multiples of 16")
        tokens = self.patch_embed["proj"]((x + 1) / 2)  # [B, E, h, w, 2d]
        grid = tokens.shape[2:]
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens.flatten(2).transpose(1, 2)], 1)
        packed = tokens.flatten(0, 1)
        segment = [Segment(len(x), tokens.shape[1], centred_table(tuple(grid), self.periods, 1))]
        outputs = {}
        for i, block in enumerate(self.blocks):
            packed = block(packed, segment)
            if i in take:
                outputs[i] = (self.norm(packed) if norm else packed).view(tokens.shape)
        found = []
        for out in (outputs[i] for i in take):
            maps = out[:, 1:].transpose(1, 2).unflatten(2, (*grid[:2], grid[2] // 2, 2)).mean(-1)  # [B, E, h, w, d]
            patches = maps if reshape else maps.flatten(2).transpose(1, 2)
            found.append((patches, out[:, 0]) if return_class_token else patches)
        return tuple(found)
