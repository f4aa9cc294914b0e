"""Operators with a compiled and a plain PyTorch implementation."""

from dinov2.ops.extension import compiled_operators

__all__ = ["compiled_operators"]
