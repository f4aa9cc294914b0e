"""A segmentation network from a configuration, weights and a recipe; saved and read back as one file."""

from __future__ import annotations

import dataclasses
import json
import logging
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import nn

from dinov2.checkpointer.checkpointer import save_atomically
from dinov2.checkpointer.teacher import open_weights
from dinov2.configs.loader import saved_config, typed_from, without_path_keys
from dinov2.data.downstream.recipes import Recipe
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.eval.segmentation_3d.adapter import AdapterOptions
from dinov2.eval.segmentation_3d.heads import UNETR, Linear, SegmentationNetwork, ViTAdapterUNETR
from dinov2.layers.attention import resolve_attention
from dinov2.models import DinoVisionTransformer3d, build_backbone
from dinov2.models.architecture import refuse_other_sizes
from dinov2.models.weights import plain_names, refuse_non_finite
from dinov2.streams import Kind, torch_seed

logger = logging.getLogger(__name__)

HEADS = ("UNETR", "ViTAdapterUNETR", "Linear")
KIND = "segmentation"


class Task(NamedTuple):
    """What a network was made for, beside its weights; travels with them."""

    recipe: Recipe
    head: str
    image_size: int
    resize_scale: float


def build_head(backbone: DinoVisionTransformer3d, cfg: DictConfig, task: Task) -> SegmentationNetwork:
    """One of the three decoders around a backbone."""
    s, channels, outputs = cfg.segmentation, task.recipe.channels, task.recipe.num_outputs
    if task.head == "Linear":
        return Linear(backbone, channels, outputs, s.linear_batch_norm)
    if task.head == "UNETR":
        return UNETR(backbone, channels, outputs, s.decoder_channels)
    options = AdapterOptions(s.inplanes, s.num_points, s.feature_ratio, s.ffn_ratio, s.drop_path_rate, s.checkpointing)
    return ViTAdapterUNETR(backbone, channels, outputs, s.decoder_channels, options)


def build_segmentation(
    cfg: DictConfig, backbone: DinoVisionTransformer3d, task: Task, train_backbone: bool, runtime: Runtime
) -> SegmentationNetwork:
    """A network to be trained: a backbone with its weights, decoder from the configuration's seed.

    Args:
        cfg: Of the backbone; `segmentation` of the decoder.
        backbone: As of `build_model_for_eval`.
        task: Recipe, head, window.
        train_backbone: Otherwise the backbone's parameters are frozen, and it stays in evaluation mode.
        runtime: Where to put it; several GPUs share their BatchNorm statistics.

    Raises:
        BadInput: A head that does not fit.
    """
    torch.manual_seed(torch_seed(cfg.train.seed, Kind.INIT, 1))
    model = build_head(backbone, cfg, task).to(runtime.device)
    choose_trained(model, train_backbone)
    if runtime.world_size > 1 and runtime.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    set_training(model, train_backbone)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    logger.info("%s: %.2f M parameters trained of %.2f M", task.head, trainable / 1e6, total / 1e6)
    return model


def choose_trained(model: SegmentationNetwork, train_backbone: bool) -> None:
    """Which parameters get gradients; of a trained backbone all but those that this network never reads."""
    model.backbone.requires_grad_(train_backbone)
    model.backbone.mask_token.requires_grad_(False)
    if isinstance(model, ViTAdapterUNETR):
        model.backbone.norm.requires_grad_(False)  # the adapter takes tokens as they leave the blocks


def set_training(model: SegmentationNetwork, train_backbone: bool) -> None:
    """Training mode; a frozen backbone stays as it is used for features."""
    model.train()
    model.backbone.train(train_backbone)


def save_segmentation(model: nn.Module, cfg: DictConfig, task: Task, path: Path) -> None:
    """All weights, the backbone's too, with what is needed to use them: one file for `dinov2 predict`."""
    meta = {
        "kind": KIND,
        "config": without_path_keys(cfg),
        "recipe": json.dumps(dataclasses.asdict(task.recipe)),
        "head": task.head,
        "image_size": task.image_size,
        "resize_scale": task.resize_scale,
    }
    save_atomically({"model": model.state_dict(), "meta": meta}, path)


def load_segmentation(path: str | Path, runtime: Runtime) -> tuple[SegmentationNetwork, DictConfig, Task]:
    """A network as it was saved, in evaluation mode.

    Raises:
        BadInput: No such file, or not one of `save_segmentation`.
    """
    content = open_weights(path)
    meta = content.get("meta") if isinstance(content, dict) else None
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(meta, dict) or meta.get("kind") != KIND or not isinstance(state, dict):
        raise BadInput(f"weights {path}: not a segmentation network: use the best_model.pth that segmentation3d.py wrote")
    try:
        cfg = saved_config(meta["config"], str(path))
        recipe: Recipe = typed_from(Recipe, _plain(json.loads(meta["recipe"])), str(path))
        task = Task(recipe, meta["head"], int(meta["image_size"]), float(meta["resize_scale"]))
        refuse_other_sizes(cfg, plain_names(state), path)
    except (KeyError, TypeError, AttributeError, RecursionError, JSONDecodeError) as err:
        raise BadInput(f"weights {path}: do not say what network they are of ({type(err).__name__}: {err})") from err
    with torch.device("meta"):  # what it would take, before it is taken
        claimed = sum(p.numel() for p in _network(cfg, task, "sdpa").parameters())
    if claimed > sum(v.numel() for v in state.values()):
        raise BadInput(f"weights {path}: say a network of {claimed} numbers, and hold fewer: another file's description")
    model = _network(cfg, task, resolve_attention(cfg.student.attention, runtime.device.type))
    refuse_non_finite(state, f"weights {path}")
    try:
        model.load_state_dict(state)
    except RuntimeError as err:
        raise BadInput(f"weights {path}: do not fit the network that they name ({str(err).splitlines()[0][:120]})") from err
    return model.to(runtime.device).eval(), cfg, task


def _network(cfg: DictConfig, task: Task, attention: str) -> SegmentationNetwork:
    return build_head(build_backbone(cfg, teacher=True, attention=attention), cfg, task)


def _plain(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe from JSON, which knows no whole numbers as keys."""
    for name in ("classes", "label_map"):
        if recipe[name]:
            recipe[name] = {int(k): v for k, v in recipe[name].items()}
    return recipe
