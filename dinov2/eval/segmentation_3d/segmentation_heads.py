"""3DINO's import path of `dinov2.eval.segmentation_3d.heads`."""

from dinov2.eval.segmentation_3d.heads import ViTAdapterUNETR as ViTAdapterUNETRHead

__all__ = ["ViTAdapterUNETRHead"]
