"""Matrix products of a training step, counted from shapes: a counter inside a step keeps its blocks from being compiled."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dinov2.layers.attention import Segment
from dinov2.layers.stochastic_depth import num_kept
from dinov2.models.vision_transformer import DinoVisionTransformer3d
from dinov2.train.meta_arch import MetaArch, linear_flops


def step_flops(model: MetaArch, batches: list[dict[str, Any]]) -> int:
    """Floating-point operations of this rank's matrix products in one update, attention counted as its products.

    What a recomputation repeats is not counted, so that utilisation is of what the update needs.

    Args:
        model: Student, teacher and their heads.
        batches: The update's micro-batches (their masks change the number a little from step to step).
    """
    return sum(_of_micro_batch(model, batch) for batch in batches)


def _of_micro_batch(model: MetaArch, batch: dict[str, Any]) -> int:
    total = 0
    for part in model.passes(batch):
        total += part.times * (_blocks(part.backbone, part.crops) + part.head_flops)
        embedding = sum(2 * c.numel() for c in part.crops) * part.backbone.embed_dim
        total += min(part.times, 2) * embedding  # voxels need no gradient
    return total


def _blocks(backbone: DinoVisionTransformer3d, crops: list[Tensor]) -> int:
    """Forward: linear layers on the kept rows, and two products of every kept sequence with itself."""
    tokens = [1 + backbone.num_register_tokens + c[0, 0].numel() // backbone.patch_size**3 for c in crops]
    segments = [Segment(len(c), length) for c, length in zip(crops, tokens, strict=True)]
    total = 0
    for block in backbone.block_list:
        is_subset = block.training and block.drop_path > block.subset_above
        kept = [s._replace(num_sequences=num_kept(s, block.drop_path)) for s in segments] if is_subset else segments
        attention = sum(4 * s.num_rows * s.length * backbone.embed_dim for s in kept)
        total += sum(s.num_rows for s in kept) * linear_flops(block) + attention
    return total
