"""Weights from files into modules: whatever layout they were saved in, strict about what is missing."""

from __future__ import annotations

import logging
import re
import struct
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.errors import BadInput
from dinov2.models.vision_transformer import DinoVisionTransformer3d, resize_pos_embed

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
_LFS_POINTER = b"version https://git-lfs"
# what torch raises for files of other kinds: its unpickler runs whatever the first bytes happen to say
_READ_ERRORS = (
    OSError, EOFError, UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, struct.error,
    MemoryError,
)  # fmt: skip
_PREFIXES = ("module.", "_orig_mod.", "teacher.")


def read_weights(path: str | Path) -> StateDict:
    """The tensors of a teacher in any of its forms, without wrappers' prefixes, blocks named flat.

    Args:
        path: A file of `torch.save` (teacher checkpoint, bare or wrapped state dict), safetensors, or the folder of a
            training checkpoint.

    Raises:
        BadInput: Missing, none of these, or a pickle that holds more than tensors and plain values.
    """
    from dinov2.fsdp.export import read_teacher

    return plain_names(read_teacher(Path(path))[0])


def plain_names(state: StateDict) -> StateDict:
    """Entries without wrappers' prefixes (`module.`, `teacher.`), blocks named flat."""
    return {_plain_name(k): v for k, v in state.items()}


def state_of(content: Any, path: str | Path) -> StateDict:
    """The tensors of what a weights file holds, out of DINOv2's, MONAI's and Lightning's wrappers; names as saved.

    Raises:
        BadInput: No tensor in it.
    """
    for wrapper in ("teacher", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not any(isinstance(v, Tensor) for v in content.values()):
        raise BadInput(f"weights {path}: holds no state dict: give a teacher checkpoint or the state dict of a backbone")
    return {k: v for k, v in content.items() if isinstance(v, Tensor)}


def refuse_pointer(path: str | Path) -> None:
    """Tell the few lines that Git LFS leaves in a clone from the weights they stand for.

    Raises:
        BadInput: They are such lines.
    """
    with suppress(OSError), Path(path).open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise BadInput(f"weights {path}: a Git LFS pointer, not the weights: run `git lfs pull` in its repository")


def open_weights(path: str | Path) -> Any:
    """What a file of `torch.save` holds, tensors and plain values only.

    Raises:
        BadInput: Missing, not such a file, or one that holds more.
    """
    refuse_pointer(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as err:
        raise BadInput(f"weights {path}: no such file") from err
    except _READ_ERRORS as err:
        if ".rank_" in Path(path).name:
            raise BadInput(f"weights {path}: one rank's share of an FSDP1 run: use its teacher_checkpoint.pth") from err
        reason = " ".join(str(err).split())[:120]
        raise BadInput(f"weights {path}: not a checkpoint of tensors that is safe to open ({reason})") from err


def _plain_name(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return re.sub(r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1.", name)


def load_backbone(backbone: DinoVisionTransformer3d, weights: StateDict, source: str | Path) -> None:
    """Load a backbone; learned positions of another grid are interpolated, which is logged.

    Args:
        backbone: Filled in place, chunked or flat.
        weights: From `read_weights`, with or without the `backbone.` prefix; other modules' entries are not read.
        source: Named in messages.

    Raises:
        BadInput: Keys are missing, unexpected or of another shape; all are counted, the first few listed.
    """
    prefixed = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    state = prefixed or {k: v for k, v in weights.items() if not k.split(".")[0].endswith("_head")}
    state = _fit_positions(backbone, state, source)
    _load_strictly(backbone, state, f"weights {source}, backbone")


def load_heads(heads: dict[str, nn.Module], weights: StateDict, source: str | Path) -> None:
    """Load projection heads (`dino_head`, `ibot_head`) by name, strictly."""
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
    module.load_state_dict({own[k]: v for k, v in state.items()})
