"""Patch and class tokens: the earlier import path of `dinov2.features.features`."""

from dinov2.features.features import class_features, patch_features, volume_features

__all__ = ["class_features", "patch_features", "volume_features"]
