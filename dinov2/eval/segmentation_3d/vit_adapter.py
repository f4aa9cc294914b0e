"""3DINO's import path of `dinov2.eval.segmentation_3d.adapter`."""

from dinov2.eval.segmentation_3d.adapter import ViTAdapter3d as ViTAdapter

__all__ = ["ViTAdapter"]
