"""DINOv2's optimiser groups, over `dinov2.train.param_groups`."""

from __future__ import annotations

from typing import Any

from torch import nn

from dinov2.train.param_groups import param_groups_with_decay


def get_params_groups_with_decay(
    model: nn.Module, lr_decay_rate: float = 1.0, patch_embed_lr_mult: float = 1.0
) -> list[dict[str, Any]]:
    """One group for each parameter that is trained, of a backbone, a head, or a module with a `backbone` among others.

    Returns:
        `params` (the parameter), `name`, `lr_multiplier`, `wd_multiplier`, `is_last_layer`.
    """
    has_backbone = hasattr(model, "backbone")
    parts = dict(model.named_children()) if has_backbone else {"backbone": model}
    depth = len(getattr(parts["backbone"], "block_list", getattr(parts["backbone"], "blocks", ())))  # a head has none
    groups = [
        group
        for module, net in parts.items()
        for group in param_groups_with_decay(net, module, depth, lr_decay_rate, patch_embed_lr_mult)
        if group["params"][0].requires_grad
    ]
    return [_published(group, "" if has_backbone else "backbone.") for group in groups]


def _published(group: dict[str, Any], prefix: str) -> dict[str, Any]:
    (param,), (name,) = group.pop("params"), group.pop("names")
    return {"params": param, "name": name.removeprefix(prefix), **group}
