"""A method's encoder: which configuration goes with its weights, what its input is a multiple of, and the network itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from omegaconf import DictConfig

from dinov2.checkpointer.teacher import Teacher
from dinov2.configs import load_and_merge_config_3d
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.eval.methods.registry import Method
from dinov2.features.setup import build_model_for_eval, config_for, require_whole_patches
from dinov2.geometry import Edges, Size3, edges
from dinov2.models import BackboneModule
from dinov2.models.encoders import build_encoder
from dinov2.models.swin import SwinEncoder3d, load_swin, swin_width
from dinov2.streams import Kind, torch_seed

logger = logging.getLogger(__name__)


def config_of(method: Method, teacher: Teacher, config: str | None, overrides: Sequence[str]) -> DictConfig:
    """The configuration of a run: of ours the network's too, which weights tell; of SwinUNETR its width.

    Raises:
        BadInput: It cannot be used, or nothing says what the network is.
    """
    if method.kind == "vit":
        return config_for(teacher, config, overrides)
    told = []
    if method.kind == "swin" and not teacher.is_untrained:
        told = [f"segmentation.swin_width={swin_width(teacher.state, teacher.source)}"]
    return load_and_merge_config_3d(config, [*told, *overrides])


def require_whole(method: Method, cfg: DictConfig, image_size: Edges, divisor: Size3 | None) -> None:
    """Raise `BadInput` where a network cannot take an input of these edges (voxels) for its patches' or its plan's sake.

    Args:
        divisor: Of a planned U-Net.
    """
    if method.kind == "unet" and divisor:
        for edge, step in zip(edges(image_size), divisor, strict=True):
            require_whole_patches(edge, step, "its U-Net's stride")
    elif method.kind == "vit":
        require_whole_patches(edges(image_size)[0], cfg.student.patch_size)


def say_what_was_used(encoder: BackboneModule | None) -> None:
    """Log which tensors of somebody else's weights an encoder took, where they need not be all."""
    if isinstance(encoder, SwinEncoder3d) and encoder.used is not None:
        logger.info("%s", encoder.used)


def open_network(
    method: Method, cfg: DictConfig, teacher: Teacher, task: str, image_size: Edges, runtime: Runtime
) -> BackboneModule | None:
    """The encoder in evaluation mode, frozen, on the device; None of a network that has none (UNet).

    Args:
        method: Whose.
        cfg: As of `config_of`.
        teacher: Its weights, opened.
        task: Of a recipe.
        image_size: Of its input; of somebody's encoder held against its patches here, which nothing tells before.
        runtime: Where to put it.

    Raises:
        BadInput: The weights do not fit.
    """
    if method.kind == "vit":
        return build_model_for_eval(cfg, teacher, runtime)
    if method.kind == "unet":
        return None
    torch.manual_seed(torch_seed(cfg.train.seed, Kind.INIT, 0))
    if method.kind == "swin":
        s = cfg.segmentation
        held = s.swin_width if teacher.is_untrained else swin_width(teacher.state, teacher.source)
        if held != s.swin_width:
            raise BadInput(
                f"weights {teacher.source}: of width {held}, not segmentation.swin_width={s.swin_width}: leave it out"
            )
        swin = SwinEncoder3d(s.swin_width, task != "segmentation", method.unit_range, s.checkpointing, s.swin_window)
        if not teacher.is_untrained:
            load_swin(swin, teacher.state, teacher.source)
        return swin.to(runtime.device).eval().requires_grad_(False)
    if teacher.source != "random" and teacher.is_untrained:
        raise BadInput(f"weights {teacher.source}: a network of this package, not {method.name}'s: give a file, or random")
    encoder = build_encoder(method.name, teacher.state, teacher.source)
    require_whole_patches(edges(image_size)[0], encoder.patch_size)
    encoder.to(runtime.device)
    encoder.eval()
    encoder.requires_grad_(False)
    return encoder
