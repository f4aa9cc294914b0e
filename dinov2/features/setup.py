"""A frozen backbone from weights: which configuration builds it, and the network itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from dinov2.checkpointer.teacher import RANDOM, Teacher, open_teacher
from dinov2.configs import load_and_merge_config_3d
from dinov2.distributed.runtime import Runtime, start_runtime
from dinov2.errors import BadInput
from dinov2.geometry import not_whole
from dinov2.layers.attention import resolve_attention
from dinov2.models import BackboneModule, DinoVisionTransformer3d, build_backbone, foreign
from dinov2.models.architecture import config_of_name, config_of_weights, refuse_other_heads
from dinov2.models.encoders import build_encoder
from dinov2.models.weights import load_backbone
from dinov2.streams import Kind, torch_seed


def config_for(teacher: Teacher, config: str | Path | None, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration given, or the default one with the network that the weights tell.

    Args:
        teacher: The weights.
        config: YAML file or name.
        overrides: ``key=value`` words, applied last. Where weights do not tell their network these may, as keys of `student`.

    Raises:
        BadInput: A configuration that cannot be used, or nothing says what the network is.
    """
    if config is not None or teacher.source == RANDOM:
        return load_and_merge_config_3d(config, overrides)
    if teacher.is_untrained:
        return config_of_name(teacher.source, overrides)
    try:
        return config_of_weights(teacher.weights, teacher.meta, teacher.source, overrides)
    except BadInput:
        if not any(word.startswith("student.") for word in overrides):
            raise
    return load_and_merge_config_3d(None, overrides)


def require_whole_patches(image_size: int, patch_size: int, what: str = "the patch size") -> None:
    """Raise `BadInput` where an edge (voxels) is no multiple of the patch, or of what stands for it."""
    if problem := not_whole(image_size, patch_size, what):
        raise BadInput(problem)


def build_model_for_eval(
    cfg: DictConfig, weights: Teacher | str | Path, runtime: Runtime | None = None, seed: int | None = None
) -> DinoVisionTransformer3d:
    """The teacher's backbone in evaluation mode; called on (B, 1, H, W, D) it returns normed class tokens (B, E).

    Args:
        cfg: The configuration it was trained with.
        weights: Opened, or a source as of `open_teacher`; ``random`` is an untrained network.
        runtime: Where to put it; default: CUDA where there is one.
        seed: Of an untrained network; default: the configuration's.

    Raises:
        BadInput: The weights are missing, none, or of another architecture.
    """
    teacher = weights if isinstance(weights, Teacher) else open_teacher(weights)
    runtime = runtime or start_runtime(cfg.train.num_threads)
    torch.manual_seed(torch_seed(cfg.train.seed if seed is None else seed, Kind.INIT, 0))
    attention = resolve_attention(cfg.student.attention, runtime.device.type)
    if teacher.is_untrained:
        backbone = build_backbone(cfg, teacher=True, attention=attention)
    else:
        refuse_other_heads(cfg, teacher.meta, teacher.source)
        with torch.device("meta"):  # every tensor is loaded or missed by name: drawing a ViT-L's first takes seconds
            backbone = build_backbone(cfg, teacher=True, attention=attention)
        load_backbone(backbone.to_empty(device="cpu"), teacher.weights, teacher.source)
    return backbone.to(runtime.device).eval().requires_grad_(False)


def build_named(name: str, teacher: Teacher, runtime: Runtime, seed: int) -> BackboneModule:
    """Somebody's network (`module:function`) in evaluation mode, frozen, on the device.

    Raises:
        BadInput: As `build_encoder`, or the weights are a network of this package by name.
    """
    if teacher.is_untrained and teacher.source != RANDOM:
        raise BadInput(f"weights {teacher.source}: a network of this package, not {name}'s: give a file, or random")
    torch.manual_seed(torch_seed(seed, Kind.INIT, 0))
    backbone = build_encoder(name, teacher.state, teacher.source)
    backbone.to(runtime.device)
    backbone.eval()
    backbone.requires_grad_(False)
    return backbone


def ours_alone(name: str | None, path: str | Path) -> str | None:
    """The encoder that a file names, where its code is this package's: what a file says runs no other.

    Raises:
        BadInput: It is somebody's.
    """
    if name is None or (name.startswith(f"{foreign.MODULE}:") and name.count(":") == 1):
        return name
    raise BadInput(f"{path}: was made with the encoder {name}, whose code is not run because a file names it: use load_encoder")
