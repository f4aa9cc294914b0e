"""Teachers between their forms: checkpoint folder, `teacher_checkpoint.pth`, safetensors; chunked or flat; with heads or not.

What `dinov2 checkpoint inspect|export` calls."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from torch import Tensor

from dinov2.configs import load_and_merge_config_3d
from dinov2.errors import BadInput
from dinov2.files import replacing, writing
from dinov2.fsdp import save_atomically

Teacher = tuple[dict[str, Tensor], dict[str, Any]]  # state dict, meta
_PREFIX = "model.teacher."
PATH_KEYS = (
    ("train", "dataset_path"),
    ("train", "output_dir"),
    ("train", "cache_dir"),
    ("student", "pretrained_weights"),
    ("student", "full_pretrained_weights"),
    ("MODEL", "WEIGHTS"),
)
_RANK_FILE = re.compile(r"\.rank_\d+\.pth$")


def read_teacher(path: Path) -> Teacher:
    """The teacher in a file or folder, names as they are saved.

    Raises:
        BadInput: None of the forms, or one rank's file of an FSDP1 run.
    """
    if path.is_dir():
        return _from_folder(path), _config_of_run(path)
    if _RANK_FILE.search(path.name):
        raise BadInput(f"{path}: one rank's share of an FSDP1 run: use its teacher_checkpoint.pth")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    from dinov2.models.weights import open_weights, state_of

    content = open_weights(path)
    return state_of(content, path), _meta_of(content)


def read_meta(path: Path) -> dict[str, Any]:
    """What a weights file says of itself; empty where it says nothing.

    Raises:
        BadInput: Not a weights file.
    """
    if path.suffix == ".safetensors":
        return _from_safetensors(path)[1]
    from dinov2.models.weights import open_weights

    return _meta_of(open_weights(path))


def _meta_of(content: Any) -> dict[str, Any]:
    meta = content.get("meta", {}) if isinstance(content, dict) else {}
    return meta if isinstance(meta, dict) else {}


def _from_folder(path: Path) -> dict[str, Tensor]:
    if not (path / ".metadata").is_file():
        raise BadInput(f"{path}: no .metadata, not a complete training checkpoint")
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    wanted = {k: m for k, m in saved.items() if k.startswith(_PREFIX)}
    if not wanted:
        raise BadInput(f"{path}: holds no teacher")
    tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in wanted.items()}
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return {k.removeprefix(_PREFIX): v for k, v in tensors.items()}


def _config_of_run(checkpoint: Path) -> dict[str, Any]:
    """What a teacher's file would say of its network, from the output folder that a checkpoint lies in."""
    file = checkpoint.absolute().parent.parent / "config.yaml"
    return {"config": OmegaConf.to_container(load_and_merge_config_3d(file))} if file.is_file() else {}


def _from_safetensors(path: Path) -> Teacher:
    from safetensors import SafetensorError, safe_open

    from dinov2.models.weights import refuse_pointer

    refuse_pointer(path)
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, _meta_of({"meta": meta})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as err:
        raise BadInput(f"{path}: not a readable safetensors file ({str(err).splitlines()[0][:120]})") from err


def renamed(state: dict[str, Tensor], chunks: int | None) -> dict[str, Tensor]:
    """Blocks named flat (0: `blocks.13.`) or in groups (`blocks.1.13.`), as `student.block_chunks`; None leaves them.

    Raises:
        BadInput: The number of blocks is not a multiple of `chunks`.
    """
    if chunks is None:
        return state
    flat = {re.sub(r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}
    if chunks == 0:
        return flat
    depth = 1 + max((int(m[1]) for m in (re.search(r"\bblocks\.(\d+)\.", k) for k in flat) if m), default=-1)
    if depth % chunks:
        raise BadInput(f"{depth} blocks cannot be put into {chunks} equal groups")
    per_group = depth // chunks
    group = lambda m: f"blocks.{int(m[1]) // per_group}.{m[1]}."  # noqa: E731
    return {re.sub(r"\bblocks\.(\d+)\.", group, k): v for k, v in flat.items()}


def without_paths(meta: dict[str, Any]) -> dict[str, Any]:
    """What weights say of themselves, without the paths of the machine that trained them."""
    config = {name: dict(part) for name, part in meta.get("config", {}).items()}
    for section, key in PATH_KEYS:
        if config.get(section, {}).get(key):
            config[section][key] = ""
    return {**meta, "config": config} if config else meta


def export(source: Path, target: Path, chunks: int | None, with_heads: bool, licence: str | None = None) -> int:
    """Write a teacher in the form of `target`'s ending (.pth or .safetensors); returns the number of tensors.

    Args:
        chunks: See `renamed`.
        licence: Of the weights, as their owner decides; None leaves what they say.
    """
    state, meta = read_teacher(source)
    meta = without_paths({**meta, "licence": licence} if licence else meta)
    state = renamed(state, chunks)
    if not with_heads:
        state = {k: v for k, v in state.items() if not k.split(".")[0].endswith("_head")}
    state = {k: v.contiguous().clone() for k, v in state.items()}
    if target.suffix == ".safetensors":
        from safetensors.torch import save

        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                temporary.write_bytes(save(state, {"meta": json.dumps(meta)}))
    elif target.suffix in (".pth", ".pt"):
        save_atomically({"teacher": state, "meta": meta}, target)
    else:
        raise BadInput(f"{target}: write .pth or .safetensors")
    return len(state)


def describe(path: Path) -> list[str]:
    """What a file or folder holds, a line each: modules, blocks, width, dtype, where it came from."""
    state, meta = read_teacher(path)
    modules = Counter()
    for name, value in state.items():
        modules[name.split(".")[0]] += value.numel()
    lines = [f"{path}: {len(state)} tensors, {sum(modules.values()) / 1e6:.2f} M numbers"]
    lines += [f"  {module:12} {count / 1e6:9.2f} M" for module, count in modules.items()]
    dtypes = Counter(str(v.dtype).removeprefix("torch.") for v in state.values())
    lines.append(f"  dtypes: {', '.join(f'{k} ({n})' for k, n in dtypes.items())}")
    blocks = {m[0] for m in (re.search(r"\bblocks\.[0-9.]+", k) for k in state) if m}
    is_chunked = any(b.count(".") > 2 for b in blocks)
    lines.append(f"  blocks: {len(blocks)}, {'chunked' if is_chunked else 'flat'} names")
    for key in ("iteration", "datalist_sha256", "licence"):
        if key in meta:
            lines.append(f"  {key}: {meta[key]}")
    return lines
