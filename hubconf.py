"""For `torch.hub.load("<owner>/<repository>", "encoder", "demo")`: the encoder, and the networks without weights."""

from dinov2.features.encoder import load_encoder as encoder
from dinov2.models.vision_transformer import vit_base_3d, vit_giant2_3d, vit_large_3d, vit_small_3d, vit_tiny_3d

dependencies = ["torch", "numpy", "omegaconf", "nibabel"]
__all__ = ["encoder", "vit_base_3d", "vit_giant2_3d", "vit_large_3d", "vit_small_3d", "vit_tiny_3d"]
