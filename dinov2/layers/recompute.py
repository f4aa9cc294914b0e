"""A block whose activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dinov2.layers.attention import Segment
from dinov2.layers.block import Block


def run_block(block: Block, packed: Tensor, segments: list[Segment], recompute: bool = False) -> Tensor:
    """`block(packed, segments)`, [T, E] -> [T, E]; with `recompute` only its input is kept for the backward pass.

    Stochastic depth is drawn here, once for both passes. Results and gradients are the same.
    """
    draws = block.draw(packed, segments)
    if not recompute or not torch.is_grad_enabled():
        return block(packed, segments, draws)
    return checkpoint(block, packed, segments, draws, use_reentrant=False, preserve_rng_state=False)
