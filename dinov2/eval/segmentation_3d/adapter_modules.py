"""Deformable DETR's call of deformable attention, over `dinov2.eval.segmentation_3d.deformable`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dinov2.eval.segmentation_3d.deformable import NUM_HEADS, MSDeformAttn3d


class MSDeformAttn(MSDeformAttn3d):
    """`MSDeformAttn3d` with the names of Deformable DETR; points and shapes both are in the order (h, w, d)."""

    def __init__(
        self, d_model: int = 256, n_levels: int = 4, n_heads: int = NUM_HEADS, n_points: int = 4, ratio: float = 1.0
    ) -> None:
        if n_heads != NUM_HEADS:
            raise NotImplementedError(f"MSDeformAttn: n_heads={n_heads}: there is a head for each octant, use {NUM_HEADS}")
        super().__init__(d_model, n_levels, n_points, ratio)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor | Sequence[Sequence[int]],
        input_level_start_index: Any = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Read `input_flatten` around the queries.

        Args:
            query: [B, Q, E].
            reference_points: [B or 1, Q, L or 1, 3] in [0, 1].
            input_flatten: [B, S, E].
            input_spatial_shapes: [L, 3].
            input_level_start_index: Not read, it follows from the shapes.
            input_padding_mask: [B, S] bool, true where a voxel is padding: it counts as zero.

        Returns:
            [B, Q, E].
        """
        rows = input_spatial_shapes.tolist() if isinstance(input_spatial_shapes, Tensor) else input_spatial_shapes
        return super().forward(query, reference_points, input_flatten, [(h, w, d) for h, w, d in rows], input_padding_mask)
