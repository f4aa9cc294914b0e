"""DINOv2's schedule and its loading of weights, over `dinov2.train.schedules` and `dinov2.checkpointer.teacher`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dinov2.checkpointer.teacher import open_weights, read_weights, state_of
from dinov2.errors import BadInput
from dinov2.models import DinoVisionTransformer3d
from dinov2.models.weights import load_backbone, plain_names
from dinov2.train.schedules import CosineSchedule


class CosineScheduler:
    """`CosineSchedule` as an array, `schedule[it]`; the frozen iterations come first, warm-up and cosine after them."""

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: int,
        warmup_iters: int = 0,
        start_warmup_value: float = 0,
        freeze_iters: int = 0,
    ) -> None:
        if warmup_iters + freeze_iters > total_iters:
            raise ValueError(f"warmup_iters={warmup_iters} and freeze_iters={freeze_iters} exceed total_iters={total_iters}")
        moving = CosineSchedule(base_value, final_value, total_iters - freeze_iters, warmup_iters, start_warmup_value)
        self.final_value, self.total_iters = final_value, total_iters
        self.schedule = np.array([0.0] * freeze_iters + [moving(i) for i in range(total_iters - freeze_iters)])

    def __getitem__(self, it: int) -> float:
        return self.final_value if it >= self.total_iters else float(self.schedule[it])


def load_pretrained_weights(
    model: DinoVisionTransformer3d, pretrained_weights: str | Path, checkpoint_key: str | None = "teacher"
) -> None:
    """Load a backbone, strictly.

    Args:
        model: Filled in place.
        pretrained_weights: Any source of `open_teacher`; for another key than `teacher` a file.
        checkpoint_key: Which entry of the file; `teacher` and None take what `open_teacher` finds.

    Raises:
        BadInput: The weights are missing, none, or of another architecture.
    """
    if checkpoint_key in (None, "teacher"):
        state = read_weights(pretrained_weights)
    else:
        content = open_weights(pretrained_weights)
        if not isinstance(content, dict) or checkpoint_key not in content:
            raise BadInput(f"weights {pretrained_weights}: no entry {checkpoint_key!r} in it: use teacher, or None")
        state = plain_names(state_of(content[checkpoint_key], pretrained_weights))
    load_backbone(model, state, pretrained_weights)
