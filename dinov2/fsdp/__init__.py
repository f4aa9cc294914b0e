"""A model spread over ranks; checkpoints are of `dinov2.checkpointer`."""

from dinov2.checkpointer.checkpointer import Checkpointer

__all__ = ["Checkpointer"]
