"""A backbone ready for evaluation: DINOv2's import path of `dinov2.features.setup`."""

from dinov2.features.setup import build_model_for_eval

__all__ = ["build_model_for_eval"]
