"""The 3D vision transformer, its factories, and weights from files."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from dinov2.models import vision_transformer as vits
from dinov2.models.backbone import Backbone, BackboneModule, BlockBackbone
from dinov2.models.vision_transformer import DinoVisionTransformer3d


def build_backbone(cfg: DictConfig, teacher: bool = False, attention: str = "sdpa") -> DinoVisionTransformer3d:
    """The network of a configuration; the teacher has no stochastic depth.

    Args:
        cfg: A merged configuration; `student` and `crops.global_crops_size` are read.
        teacher: Build the teacher's side.
        attention: `sdpa` or `xformers`, as resolved for the device.
    """
    s = cfg.student
    own = {k: s[k] for k in ("embed_dim", "depth", "num_heads") if s[k] is not None}
    return vits.FACTORIES[s.arch](
        patch_size=s.patch_size,
        img_size=cfg.crops.global_crops_size,
        init_values=s.layerscale,
        ffn_layer=s.ffn_layer,
        block_chunks=s.block_chunks,
        qkv_bias=s.qkv_bias,
        proj_bias=s.proj_bias,
        ffn_bias=s.ffn_bias,
        num_register_tokens=s.num_register_tokens,
        pos_encoding=s.pos_encoding,
        interpolate_offset=s.interpolate_offset,
        init=s.init,
        drop_path_rate=0.0 if teacher else s.drop_path_rate,
        drop_path_uniform=s.drop_path_uniform,
        attention=attention,
        **own,
    )


def build_model_from_cfg(cfg: DictConfig, only_teacher: bool = False) -> tuple[Any, ...]:
    """DINOv2's call of `build_backbone`: (student, teacher, embed_dim), or (teacher, embed_dim)."""
    teacher = build_backbone(cfg, teacher=True)
    both = (teacher,) if only_teacher else (build_backbone(cfg), teacher)
    return *both, teacher.embed_dim


__all__ = [
    "Backbone",
    "BackboneModule",
    "BlockBackbone",
    "DinoVisionTransformer3d",
    "build_backbone",
    "build_model_from_cfg",
]
