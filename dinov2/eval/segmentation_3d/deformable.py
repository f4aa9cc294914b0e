"""Multi-scale deformable attention between tokens that have places in a volume.

# B batch, Q queries, S voxels of all value levels, E width of tokens, V width inside, M heads, L levels, P points
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov2.errors import BadInput
from dinov2.ops import ms_deform_attn_3d

Size3 = tuple[int, int, int]
NUM_HEADS = 8  # one for each octant


def cell_centres(shapes: Sequence[Size3], device: torch.device | str = "cpu") -> Tensor:
    """Centres of the cells of grids side by side, in [0, 1] along (h, w, d): [sum of H*W*D, 3], the last axis fastest."""
    grids = []
    for shape in shapes:
        axes = [(torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n for n in shape]
        grids.append(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3))
    return torch.cat(grids)


def octant_offsets(num_points: int) -> Tensor:
    """First offsets in voxels, [M, P, 3]: head i looks into octant i, its point k at (±k, ±k, ±k).

    Signs in the order ---, --+, -+-, -++, +--, +-+, ++-, +++.

    Source: 3DINO paper, "3D ViT-Adapter", O_init-3D.
    """
    sign = torch.tensor([-1.0, 1.0])
    signs = torch.cartesian_prod(sign, sign, sign)  # [M, 3], the last fastest
    steps = torch.arange(1.0, num_points + 1)
    return signs[:, None] * steps[None, :, None]


def in_compute_dtype(x: Tensor) -> Tensor:
    """What a normalisation gives, in autocast's dtype: the layers that read it share (and keep) one copy, not one each."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


class MSDeformAttn3d(nn.Module):
    """Each query reads a few points of each level around its own place, at offsets and with weights that it predicts.

    Args:
        dim: E.
        num_levels: L.
        num_points: P.
        ratio: V = ratio * E, the width that values are read in.

    Raises:
        BadInput: V is no multiple of the 8 heads.

    Source: Deformable DETR, eq. 3; 3DINO paper, "3D ViT-Adapter".
    """

    def __init__(self, dim: int, num_levels: int, num_points: int = 4, ratio: float = 0.25) -> None:
        super().__init__()
        inner = int(dim * ratio)
        if inner % NUM_HEADS or inner == 0:
            raise BadInput(
                f"segmentation.feature_ratio={ratio} of a width of {dim} gives {inner}, no multiple of {NUM_HEADS} heads: "
                f"use a ratio that gives {max(1, round(inner / NUM_HEADS)) * NUM_HEADS}"
            )
        self.num_levels, self.num_points = num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, NUM_HEADS * num_levels * num_points * 3)
        self.attention_weights = nn.Linear(dim, NUM_HEADS * num_levels * num_points)
        self.value_proj = nn.Linear(dim, inner)
        self.output_proj = nn.Linear(inner, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets by octant whatever the query, equal weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        offsets = octant_offsets(self.num_points)[:, None].expand(-1, self.num_levels, -1, -1)  # [M, L, P, 3]
        self.sampling_offsets.bias.data.copy_(offsets.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, query: Tensor, places: Tensor, values: Tensor, shapes: Sequence[Size3], padding: Tensor | None = None
    ) -> Tensor:
        """Read `values` around the queries.

        Args:
            query: [B, Q, E].
            places: [Q, 3] in [0, 1] along (h, w, d), of `cell_centres`; or [B or 1, Q, L or 1, 3].
            values: [B, S, E].
            shapes: (H, W, D) of each level of the values.
            padding: [B, S] bool, true where a voxel is no part of the scan: it counts as zero, as what lies outside.

        Returns:
            [B, Q, E].
        """
        b, q, _ = query.shape
        layout = (b, q, NUM_HEADS, self.num_levels, self.num_points)
        value = self.value_proj(values)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.unflatten(-1, (NUM_HEADS, -1))  # [B, S, M, V / M]
        dtype = torch.promote_types(query.dtype, torch.float32)  # half precision could not tell places apart
        offsets = self.sampling_offsets(query).view(*layout, 3).to(dtype)  # voxels
        weights = self.attention_weights(query).view(*layout[:3], -1).softmax(-1).view(layout)
        sizes = torch.tensor(shapes, dtype=dtype, device=query.device)[:, None]  # [L, 1, 3]
        of_levels = places[None, :, None] if places.dim() == 2 else places
        locations = of_levels.to(dtype)[:, :, None, :, None] + offsets / sizes  # [B, Q, M, L, P, 3]
        return self.output_proj(ms_deform_attn_3d(value, list(shapes), locations, weights))
