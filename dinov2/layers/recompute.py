"""A block whose activations are partly computed again in the backward pass instead of being kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dinov2.layers.attention import Segment
from dinov2.layers.block import Block

MODES = ("none", "selective", "full")
_aten = torch.ops.aten
# the costly operations, which `selective` does not repeat; what lies between them is cheap and holds most of the memory
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def run_block(block: Block, packed: Tensor, segments: list[Segment], mode: str) -> Tensor:
    """`block(packed, segments)`, [T, E] -> [T, E], keeping for the backward pass what `mode` says.

    `none` keeps all that autograd asks for; `selective` the results of matrix products and attention; `full` the input only.
    Stochastic depth is drawn here, once for both passes. Results and gradients are the same in each.
    """
    draws = block.draw(packed, segments)
    if mode == "none" or not torch.is_grad_enabled():
        return block(packed, segments, draws)
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}
    return checkpoint(block, packed, segments, draws, use_reentrant=False, preserve_rng_state=False, **contexts)


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
