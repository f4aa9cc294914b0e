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

from dinov2.checkpointer.saving import save_atomically
from dinov2.checkpointer.teacher import open_weights
from dinov2.configs.loader import saved_config, typed_from, without_path_keys
from dinov2.data.downstream.recipes import Recipe
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.eval.methods.registry import OURS, find_method
from dinov2.eval.methods.unet_plan import UNetPlan
from dinov2.eval.segmentation_3d.adapter import AdapterOptions
from dinov2.eval.segmentation_3d.heads import UNETR, Linear, SegmentationNetwork, ViTAdapterUNETR
from dinov2.eval.segmentation_3d.swin import SwinUNETR3d
from dinov2.eval.segmentation_3d.unet import UNet3d
from dinov2.geometry import Edges, triple
from dinov2.layers.attention import resolve_attention
from dinov2.models import BackboneModule, BlockBackbone, DinoVisionTransformer3d, build_backbone
from dinov2.models.architecture import refuse_other_sizes
from dinov2.models.encoders import build_encoder
from dinov2.models.swin import SwinEncoder3d, swin_width
from dinov2.models.weights import StateDict, plain_names, refuse_non_finite
from dinov2.streams import Kind, torch_seed

logger = logging.getLogger(__name__)

KIND = "segmentation"


class Task(NamedTuple):
    """What a network was made for, beside its weights; travels with them."""

    recipe: Recipe
    head: str
    image_size: Edges
    resize_scale: float
    method: str = OURS
    plan: UNetPlan | None = None  # of a U-Net


def build_head(backbone: BackboneModule | None, cfg: DictConfig, task: Task) -> SegmentationNetwork:
    """A decoder around a backbone, or a network that has none.

    Raises:
        BadInput: They do not go together.
    """
    s, channels, outputs = cfg.segmentation, task.recipe.channels, task.recipe.num_outputs
    if backbone is None:
        if task.plan is None:
            raise BadInput(f"{task.method}: has neither an encoder nor a plan of a U-Net")
        return UNet3d(task.plan, s.unet_width, channels, outputs)
    if isinstance(backbone, SwinEncoder3d):
        return SwinUNETR3d(backbone, channels, outputs)
    if task.head == "Linear":
        return Linear(backbone, channels, outputs, s.linear_batch_norm)
    if task.head == "UNETR":
        return UNETR(backbone, channels, outputs, s.decoder_channels)
    if not isinstance(backbone, BlockBackbone):
        raise BadInput(
            f"--segmentation-head {task.head}: the encoder of {task.method} does not give its blocks "
            "(prepare_tokens_with_masks, segment, run_blocks): use Linear or UNETR"
        )
    options = AdapterOptions(s.inplanes, s.num_points, s.feature_ratio, s.ffn_ratio, s.drop_path_rate, s.checkpointing)
    return ViTAdapterUNETR(backbone, channels, outputs, s.decoder_channels, options)


def build_segmentation(
    cfg: DictConfig, backbone: BackboneModule | None, task: Task, train_backbone: bool, runtime: Runtime
) -> SegmentationNetwork:
    """A network to be trained: a backbone with its weights, decoder from the configuration's seed.

    Args:
        cfg: Of the backbone; `segmentation` of the decoder.
        backbone: Of the method (`methods.networks.open_network`); None: it has none.
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
    if model.backbone is None:
        return
    model.backbone.requires_grad_(train_backbone)
    if isinstance(model.backbone, DinoVisionTransformer3d):
        model.backbone.mask_token.requires_grad_(False)
        if isinstance(model, ViTAdapterUNETR):
            model.backbone.norm.requires_grad_(False)  # the adapter takes tokens as they leave the blocks


def set_training(model: SegmentationNetwork, train_backbone: bool) -> None:
    """Training mode; a frozen backbone stays as it is used for features."""
    model.train()
    if model.backbone is not None:
        model.backbone.train(train_backbone)


def save_segmentation(model: nn.Module, cfg: DictConfig, task: Task, path: Path) -> None:
    """All weights, the backbone's too, with what is needed to use them: one file for `dinov2 predict`."""
    meta = {
        "kind": KIND,
        "config": without_path_keys(cfg),
        "recipe": json.dumps(dataclasses.asdict(task.recipe)),
        "head": task.head,
        "image_size": task.image_size if isinstance(task.image_size, int) else list(task.image_size),
        "resize_scale": task.resize_scale,
        "method": task.method,
        "plan": task.plan and task.plan.as_plain(),
    }
    save_atomically({"model": model.state_dict(), "meta": meta}, path)


def load_segmentation(
    path: str | Path, runtime: Runtime, encoder: str | None = None
) -> tuple[SegmentationNetwork, DictConfig, Task]:
    """A network as it was saved, in evaluation mode.

    Args:
        path: Of `save_segmentation`.
        runtime: Where to put it.
        encoder: `module:function` of a network around somebody's encoder. A file alone names no code that is run.

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
        task = _saved_task(meta, path)
        kind = find_method(task.method).kind
        if kind == "vit":
            refuse_other_sizes(cfg, plain_names(state), path)
        if kind == "swin":
            _refuse_other_width(cfg, state, path)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, JSONDecodeError) as err:
        if isinstance(err, BadInput):
            raise
        raise BadInput(f"weights {path}: do not say what network they are of ({type(err).__name__}: {err})") from err
    if kind == "encoder" and task.method != encoder:
        raise BadInput(
            f"weights {path}: around the encoder {task.method}: give --encoder {task.method} where you trust its code"
        )
    if kind in ("vit", "unet"):
        with torch.device("meta"):  # what it would take, before it is taken
            claimed = sum(p.numel() for p in _network(cfg, task, kind, "sdpa").parameters())
        if claimed > sum(v.numel() for v in state.values()):
            raise BadInput(f"weights {path}: say a network of {claimed} numbers, and hold fewer: another file's description")
    model = _network(cfg, task, kind, resolve_attention(cfg.student.attention, runtime.device.type))
    refuse_non_finite(state, f"weights {path}")
    try:
        model.load_state_dict(state)
    except RuntimeError as err:
        raise BadInput(f"weights {path}: do not fit the network that they name ({str(err).splitlines()[0][:120]})") from err
    return model.to(runtime.device).eval(), cfg, task


def _saved_task(meta: dict[str, Any], path: str | Path) -> Task:
    recipe: Recipe = typed_from(Recipe, _plain(json.loads(meta["recipe"])), str(path))
    size: Edges = meta["image_size"] if isinstance(meta["image_size"], int) else triple(map(int, meta["image_size"]))
    plan = UNetPlan.from_plain(meta["plan"]) if meta.get("plan") else None
    return Task(recipe, meta["head"], size, float(meta["resize_scale"]), meta.get("method", OURS), plan)


def _refuse_other_width(cfg: DictConfig, state: StateDict, path: str | Path) -> None:
    """Raise `BadInput` where the width that a file says is not that of its tensors."""
    inside = {k.partition(".encoder.")[2]: v for k, v in state.items() if ".encoder." in k}
    held = swin_width(inside, path)
    if held != cfg.segmentation.swin_width:
        raise BadInput(
            f"weights {path}: say segmentation.swin_width {cfg.segmentation.swin_width}, and hold tensors of {held}: "
            "another file's description"
        )


def _network(cfg: DictConfig, task: Task, kind: str, attention: str) -> SegmentationNetwork:
    """An untrained network of a kind of methods, which a state dict fills."""
    if kind == "unet":
        return build_head(None, cfg, task)
    if kind == "swin":
        s, method = cfg.segmentation, find_method(task.method)
        swin = SwinEncoder3d(s.swin_width, False, method.unit_range, s.checkpointing, s.swin_window)
        return build_head(swin, cfg, task)
    if kind == "encoder":
        return build_head(build_encoder(task.method, {}, task.method), cfg, task)
    return build_head(build_backbone(cfg, teacher=True, attention=attention), cfg, task)


def _plain(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe from JSON, which knows no whole numbers as keys."""
    for name in ("classes", "label_map"):
        if recipe[name]:
            recipe[name] = {int(k): v for k, v in recipe[name].items()}
    return recipe
