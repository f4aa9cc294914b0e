"""Self-supervised pretraining of 3D vision transformers on medical volumes: DINOv2's shape, our own text."""

from dinov2.version import __version__

__distribution__ = "dinov2-3d"  # tells this package from Meta's `dinov2`, which has the same import name
__all__ = ["__distribution__", "__version__"]
