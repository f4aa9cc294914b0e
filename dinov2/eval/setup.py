"""A backbone from a configuration and a weights file, ready for evaluation."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig

from dinov2.data.streams import Kind, torch_seed
from dinov2.distributed.runtime import Runtime, start_runtime
from dinov2.layers.attention import resolve_attention
from dinov2.models import DinoVisionTransformer3d, build_backbone
from dinov2.models.weights import load_backbone, read_weights


def build_model_for_eval(
    cfg: DictConfig, pretrained_weights: str | Path, runtime: Runtime | None = None, seed: int | None = None
) -> DinoVisionTransformer3d:
    """The teacher's backbone in evaluation mode; called on (B, 1, H, W, D) it returns normed class tokens (B, E).

    Args:
        cfg: The configuration it was trained with.
        pretrained_weights: A teacher checkpoint, or the word ``random`` for an untrained network.
        runtime: Where to put it; default: CUDA where there is one.
        seed: Of an untrained network; default: the configuration's.

    Raises:
        BadInput: The file is missing, no checkpoint, or of another architecture.
    """
    runtime = runtime or start_runtime(cfg.train.num_threads)
    torch.manual_seed(torch_seed(cfg.train.seed if seed is None else seed, Kind.INIT, 0))
    backbone = build_backbone(cfg, teacher=True, attention=resolve_attention(cfg.student.attention, runtime.device.type))
    if pretrained_weights != "random":
        load_backbone(backbone, read_weights(pretrained_weights), pretrained_weights)
    return backbone.to(runtime.device).eval().requires_grad_(False)
