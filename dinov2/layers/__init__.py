"""Parts of the vision transformer and the projection head."""

from dinov2.layers.attention import Attention, MemEffAttention, Segment, packed_attention
from dinov2.layers.block import Block, NestedTensorBlock
from dinov2.layers.dino_head import DINOHead
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from dinov2.layers.patch_embed import PatchEmbed3d
from dinov2.layers.swiglu_ffn import SwiGLUFFN

__all__ = [
    "Attention", "Block", "DINOHead", "LayerScale", "MemEffAttention", "Mlp", "NestedTensorBlock", "PatchEmbed3d", "Segment",
    "SwiGLUFFN", "packed_attention",
]  # fmt: skip
