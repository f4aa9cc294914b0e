"""Volumes to patch tokens: 3DINO's import path of `dinov2.layers.patch_embed`."""

from dinov2.layers.patch_embed import PatchEmbed3d

__all__ = ["PatchEmbed3d"]
