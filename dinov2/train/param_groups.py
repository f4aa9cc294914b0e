"""Optimiser groups: learning-rate factor by depth, weight-decay factor by kind, prototypes apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_INPUT_SIDE = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")


def layer_index(name: str, depth: int) -> int:
    """0 for the input side of a backbone, 1 + block index for blocks (chunked or flat names), depth + 1 for the rest."""
    parts = name.split(".")
    if parts[1] in _INPUT_SIDE:
        return 0
    if parts[1] == "blocks":
        numbers = [int(p) for p in parts[2:4] if p.isdigit()]
        return numbers[-1] + 1
    return depth + 1


def param_groups_with_decay(
    net: nn.Module, module: str, depth: int, layerwise_decay: float, patch_embed_lr_mult: float
) -> Iterator[dict[str, Any]]:
    """One group per parameter of `student[module]`, with DINOv2's factors.

    Biases, norms and LayerScale have no weight decay; `is_last_layer` marks the prototypes, whose learning rate is 0
    during `optim.freeze_last_layer_epochs`.
    """
    for leaf, param in net.named_parameters():
        name = f"{module}.{leaf}"
        lr = layerwise_decay ** (depth + 1 - layer_index(name, depth))
        no_decay = name.endswith(".bias") or "norm" in name or "gamma" in name
        yield {
            "params": [param],
            "names": [name],
            "lr_multiplier": lr * (patch_embed_lr_mult if "patch_embed" in name else 1.0),
            "wd_multiplier": 0.0 if no_decay else 1.0,
            "is_last_layer": "last_layer" in name,
        }


def fuse_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge groups whose factors are equal, so that the optimiser updates many tensors in one call."""
    fused: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for g in groups:
        factors = (g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"])
        if factors in fused:
            fused[factors]["params"] += g["params"]
            fused[factors]["names"] += g["names"]
        else:
            fused[factors] = g
    return list(fused.values())
