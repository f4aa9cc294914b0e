"""Operators with a compiled and a plain PyTorch implementation."""

from dinov2.ops.extension import compiled_operators, cuda_kernels
from dinov2.ops.ms_deform_attn import ms_deform_attn_3d, ms_deform_attn_3d_reference

__all__ = ["compiled_operators", "cuda_kernels", "ms_deform_attn_3d", "ms_deform_attn_3d_reference"]
