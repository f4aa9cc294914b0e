"""Tensors into modules: whatever names they were saved under, strict about what is missing.

Where tensors come from: `checkpointer/teacher.py`."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from torch import Tensor, nn

from dinov2.errors import BadInput
from dinov2.models.vision_transformer import DinoVisionTransformer3d, resize_pos_embed

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
_PREFIXES = ("module.", "_orig_mod.", "teacher.")


def plain_names(state: StateDict) -> StateDict:
    """Entries without wrappers' prefixes (`module.`, `teacher.`), blocks named flat."""
    return {_plain_name(k): v for k, v in state.items()}


def _plain_name(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return re.sub(r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1.", name)


_EMBEDDING = "patch_embed.proj.weight"  # what every backbone has


def unwrapped(weights: StateDict, source: str | Path) -> StateDict:
    """Weights without the one name that stands before a backbone (`student.`, `model.`, `encoder.`, ...), which is said.

    Args:
        weights: By plain names (`plain_names`).
        source: Named in messages.

    Raises:
        BadInput: There are several such names.
    """
    found = sorted({k.removesuffix(_EMBEDDING).removesuffix("backbone.") for k in weights if k.endswith(_EMBEDDING)})
    if len(found) > 1 and "" not in found:
        raise BadInput(f"weights {source}: hold {len(found)} networks ({', '.join(found)}): save the tensors of one of them")
    prefix = "" if "" in found or not found else found[0]
    if prefix:
        logger.info("weights %s: those of its entries whose names begin with %s", source, prefix)
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    return weights


def refuse_2d(weights: StateDict, source: str | Path) -> None:
    """Tell the tensors of a 2D network, which fit nothing here, from those of a 3D one.

    Raises:
        BadInput: They are a 2D one's.
    """
    embedding = weights.get(_EMBEDDING, weights.get(f"backbone.{_EMBEDDING}"))
    if embedding is not None and embedding.ndim == 4:
        raise BadInput(
            f"weights {source}: of a 2D network (its patches are {tuple(embedding.shape[2:])} pixels of "
            f"{embedding.shape[1]} channels), and this package's are 3D: student.pretrained_weights_inflation=central starts a "
            "training from them, --encoder dinov2.models.foreign:dinov2_slices takes DINOv2's slice by slice"
        )


def load_backbone(backbone: DinoVisionTransformer3d, weights: StateDict, source: str | Path) -> None:
    """Load a backbone; learned positions of another grid are interpolated, which is logged.

    Args:
        backbone: Filled in place, chunked or flat.
        weights: By plain names (`plain_names`), with or without the `backbone.` prefix; other modules' entries are not read.
        source: Named in messages.

    Raises:
        BadInput: Keys are missing, unexpected or of another shape; all are counted, the first few listed.
    """
    prefixed = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    state = prefixed or {k: v for k, v in weights.items() if not k.split(".")[0].endswith("_head")}
    state = _fit_positions(backbone, state, source)
    _load_strictly(backbone, state, f"weights {source}, backbone")


def load_heads(heads: dict[str, nn.Module], weights: StateDict, source: str | Path) -> None:
    """Load projection heads (`dino_head`, `ibot_head`) by name, strictly.

    Raises:
        BadInput: There are none, or they do not fit.
    """
    if not any(key.startswith(f"{name}.") for key in weights for name in heads):
        raise BadInput(
            f"weights {source}: hold no heads ({', '.join(heads)}): use student.pretrained_weights (the backbone alone)"
        )
    for name, head in heads.items():
        state = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
        _load_strictly(head, state, f"weights {source}, {name}")


def _fit_positions(backbone: DinoVisionTransformer3d, state: StateDict, source: str | Path) -> StateDict:
    saved, own = state.get("pos_embed"), backbone.pos_embed
    if saved is None or own is None or saved.ndim != 3 or saved.shape == own.shape or saved.shape[2] != own.shape[2]:
        return state
    edge = round((saved.shape[1] - 1) ** (1 / 3))
    if edge**3 + 1 != saved.shape[1]:
        return state
    new = resize_pos_embed(saved, (edge,) * 3, backbone.grid_hwd, backbone.interpolate_offset)
    logger.info("%s: positions of a grid of %d cubed interpolated to %s", source, edge, backbone.grid_hwd)
    return {**state, "pos_embed": new}


def refuse_non_finite(state: StateDict, what: str) -> None:
    """Raise `BadInput` naming the tensors that hold NaN or infinity: what is computed with them means nothing."""
    bad = [k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if bad:
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise BadInput(f"{what}: {len(bad)} tensors hold NaN or infinity ({shown}): use weights of an earlier iteration")


def _load_strictly(module: nn.Module, state: StateDict, what: str) -> None:
    own = {_plain_name(k): k for k in module.state_dict()}
    shapes = {plain: tuple(v.shape) for plain, v in zip(own, module.state_dict().values(), strict=True)}
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    both = [k for k in own if k in state]
    reshaped = [f"{k} {tuple(state[k].shape)} for {shapes[k]}" for k in both if tuple(state[k].shape) != shapes[k]]
    problems = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if keys
    ]
    if problems:
        raise BadInput(f"{what}: does not fit this network: {'; '.join(problems)}: check student.arch and patch_size")
    refuse_non_finite(state, what)
    module.load_state_dict({own[k]: v for k, v in state.items()})
