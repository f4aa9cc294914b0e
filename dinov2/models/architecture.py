"""Which network weights are of: by what they say of themselves, or by the names and shapes of their tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinov2.configs import load_and_merge_config_3d
from dinov2.configs.loader import network_shape, saved_config
from dinov2.configs.schema import ARCH_SHAPES
from dinov2.errors import BadInput
from dinov2.models.weights import StateDict

logger = logging.getLogger(__name__)

_STUDENT_KEYS = (  # what `build_backbone` reads
    "arch", "patch_size", "embed_dim", "depth", "num_heads", "layerscale", "ffn_layer", "qkv_bias", "proj_bias", "ffn_bias",
    "num_register_tokens", "pos_encoding", "interpolate_offset", "init",
)  # fmt: skip


def config_of_weights(state: StateDict, meta: dict[str, Any], source: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """A configuration that builds the backbone of some weights, blocks named flat.

    Args:
        state: Plain names (`plain_names`), with or without the `backbone.` prefix.
        meta: What the file says of itself; its `config` is believed where there is one.
        source: Named in messages.
        overrides: ``key=value`` words, applied last.

    Raises:
        BadInput: Nothing says what the network is, or it is none that can be built.
    """
    student = saved_network(meta)
    if student is not None:
        size = meta["config"]["crops"].get("global_crops_size", 96)
    else:
        student, size = _told_by_tensors({k.removeprefix("backbone."): v for k, v in state.items()}, source)
    content, name, words = {"student": student}, f"weights {source}", _shape_words(size)
    refuse_other_sizes(saved_config(content, name, words), state, source)
    return saved_config(content, name, [*words, *overrides])


def config_of_name(arch: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of a factory's network with default settings."""
    return load_and_merge_config_3d(None, [f"student.arch={arch}", *_shape_words(96), *overrides])


def _shape_words(size: int) -> list[str]:
    """Overrides for a network whose learned positions are laid out for volumes of `size` voxels an edge."""
    return ["student.block_chunks=0", f"crops.global_crops_size={size}", f"crops.local_crops_size={size}"]


def saved_network(meta: dict[str, Any]) -> dict[str, Any] | None:
    """The `student` keys that weights say of their network; None where they do not say."""
    saved = meta.get("config")
    if isinstance(saved, dict) and isinstance(saved.get("student"), dict) and isinstance(saved.get("crops"), dict):
        return {k: saved["student"][k] for k in _STUDENT_KEYS if k in saved["student"]}
    return None


def refuse_other_sizes(cfg: DictConfig, state: StateDict, source: str | Path) -> None:
    """Hold what weights say of their network against their tensors, before anything of a size they name is built.

    Args:
        cfg: Of the weights.
        state: Plain names, behind any prefix; what is not there is the strict loader's business.

    Raises:
        BadInput: They differ.
    """
    tensor = lambda ending: next((v for k, v in state.items() if k.endswith(ending)), None)  # noqa: E731
    cls, patch, positions, registers = (
        tensor(name) for name in ("cls_token", "patch_embed.proj.weight", "pos_embed", "register_tokens")
    )
    blocks = [int(m[1]) for m in (re.search(r"\bblocks\.(\d+)\.", k) for k in state) if m]
    student, (embed_dim, depth, _) = cfg.student, network_shape(cfg)
    grid = cfg.crops.global_crops_size // student.patch_size
    learned = positions if student.pos_encoding == "learned" else None
    said_and_held = {
        "embed_dim": (embed_dim, None if cls is None else cls.shape[-1]),
        "depth": (depth, 1 + max(blocks) if blocks else None),
        "patch_size": (student.patch_size, None if patch is None else patch.shape[-1]),
        "num_register_tokens": (student.num_register_tokens, 0 if registers is None else registers.shape[1]),
        "positions": (1 + grid**3, None if learned is None or learned.ndim != 3 else learned.shape[1]),
    }
    for name, (said, held) in said_and_held.items():
        if held is not None and said != held:
            raise BadInput(f"weights {source}: say {name} {said} of their network, and hold tensors of {held}: another file's")


def refuse_other_heads(cfg: DictConfig, meta: dict[str, Any], source: str | Path) -> None:
    """Hold a configuration against what weights say where no tensor shows the difference: the heads of a block.

    Raises:
        BadInput: They differ.
    """
    student = saved_network(meta) or {}
    if student.get("arch") not in ARCH_SHAPES:
        return
    own, given = (s.get("num_heads") or ARCH_SHAPES[s["arch"]][2] for s in (student, cfg.student))
    if own != given:
        raise BadInput(
            f"weights {source}: does not fit this network: trained with {own} heads a block, the configuration has {given}: "
            "give the configuration they were trained with, or none"
        )


def _told_by_tensors(state: StateDict, source: str | Path) -> tuple[dict[str, Any], int]:
    """`student` keys and the edge (voxels) of the volume that learned positions are laid out for.

    What a tensor that is not there would say keeps its default; the strict loader then names the tensor.
    """
    blocks = [int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", k) for k in state) if m]
    width = next((state[k].shape[-1] for k in ("cls_token", "norm.weight", "norm.bias", "mask_token") if k in state), None)
    if not blocks or width is None:
        raise BadInput(f"weights {source}: no vision transformer's tensors in it (cls_token, norm, blocks.0...)")
    shape = (width, 1 + max(blocks))
    arch = {(e, depth): name for name, (e, depth, _) in ARCH_SHAPES.items()}.get(shape)
    if arch is None:
        raise BadInput(
            f"weights {source}: width {shape[0]} and {shape[1]} blocks are of no network known by name, and the file does not "
            "say how many heads it has: give the configuration it was trained with (config=)"
        )
    projection, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    patch_size = 16 if projection is None else projection.shape[-1]
    edge = 6 if positions is None or positions.ndim != 3 else round((positions.shape[1] - 1) ** (1 / 3))
    has = lambda *endings: any(k.endswith(endings) for k in state)  # noqa: E731
    student = {
        "arch": arch,
        "patch_size": patch_size,
        "ffn_layer": "swiglufused" if has(".mlp.w12.weight") else "mlp",
        "qkv_bias": has(".attn.qkv.bias"),
        "proj_bias": has(".attn.proj.bias"),
        "ffn_bias": has(".mlp.fc1.bias", ".mlp.w12.bias"),
        "num_register_tokens": state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        **({} if has(".ls1.gamma") else {"layerscale": None}),
    }
    logger.info("%s: %s by its tensors, patches of %d, positions for %d cubed", source, arch, patch_size, edge * patch_size)
    return student, max(edge, 1) * patch_size
