"""A model spread over ranks; checkpoints are of `dinov2.checkpointer`."""

from dinov2.checkpointer.checkpointer import Checkpointer
from dinov2.errors import replaced

FSDPCheckpointer = replaced(
    "dinov2.fsdp.FSDPCheckpointer",
    "dinov2.fsdp.Checkpointer(folder, keep), which saves and resumes dinov2.train.state.TrainState(model, optimizer)",
)

__all__ = ["Checkpointer", "FSDPCheckpointer"]
