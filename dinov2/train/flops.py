"""Matrix products of a training step, counted from shapes: a counter inside a step keeps its blocks from being compiled."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dinov2.layers.attention import Segment
from dinov2.layers.dino_head import WeightNormLinear
from dinov2.layers.stochastic_depth import num_kept
from dinov2.models.vision_transformer import DinoVisionTransformer3d
from dinov2.train.ssl_meta_arch import SSLMetaArch


def step_flops(model: SSLMetaArch, batches: list[dict[str, Any]]) -> int:
    """Floating-point operations of this rank's matrix products in one update, attention counted as its products.

    What a recomputation repeats is not counted, so that utilisation is of what the update needs.

    Args:
        model: Student, teacher and their heads.
        batches: The update's micro-batches (their masks change the number a little from step to step).
    """
    return sum(_of_micro_batch(model, batch) for batch in batches)


def _of_micro_batch(model: SSLMetaArch, batch: dict[str, Any]) -> int:
    crops = [batch["collated_global_crops"], batch["collated_local_crops"]]
    crops = [c for c in crops if len(c)]
    num_patches, total = len(batch["mask_indices_list"]), 0
    # the student's products have two more of their size in the backward pass; voxels need no gradient
    for net, passed, times in ((model.student, crops, 3), (model.teacher, crops[:1], 1)):
        patch_head = net["ibot_head"] if "ibot_head" in net else net["dino_head"]
        heads = _linear(net["dino_head"]) * sum(len(c) for c in passed) + _linear(patch_head) * num_patches
        total += times * (_blocks(net.backbone, passed) + heads)
        total += min(times, 2) * sum(2 * c.numel() for c in passed) * net.backbone.embed_dim
    return total


def _linear(module: nn.Module) -> int:
    """Operations of a module's linear layers for one row."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | WeightNormLinear)]
    return sum(2 * (m.weight_v if isinstance(m, WeightNormLinear) else m.weight).numel() for m in layers)


def _blocks(backbone: DinoVisionTransformer3d, crops: list[Tensor]) -> int:
    """Forward: linear layers on the kept rows, and two products of every kept sequence with itself."""
    tokens = [1 + backbone.num_register_tokens + c[0, 0].numel() // backbone.patch_size**3 for c in crops]
    segments = [Segment(len(c), length) for c, length in zip(crops, tokens, strict=True)]
    total = 0
    for block in backbone.block_list:
        is_subset = block.training and block.drop_path > block.subset_above
        kept = [s._replace(num_sequences=num_kept(s, block.drop_path)) for s in segments] if is_subset else segments
        attention = sum(4 * s.num_rows * s.length * backbone.embed_dim for s in kept)
        total += sum(s.num_rows for s in kept) * _linear(block) + attention
    return total
