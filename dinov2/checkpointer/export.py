"""Teachers between their forms: checkpoint folder, `teacher_checkpoint.pth`, safetensors; chunked or flat; with heads or not.

What `dinov2 checkpoint inspect|export` calls."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2.checkpointer.domain import DOMAIN, Domain
from dinov2.checkpointer.saving import save_atomically
from dinov2.checkpointer.sealed import write_safetensors
from dinov2.checkpointer.teacher import open_trained
from dinov2.configs.loader import without_path_keys
from dinov2.errors import BadInput


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
    return {**meta, "config": without_path_keys(meta["config"])} if isinstance(meta.get("config"), dict) else meta


def export(source: str | Path, target: Path, chunks: int | None, with_heads: bool, licence: str | None = None) -> int:
    """Write a teacher in the form of `target`'s ending (.pth or .safetensors); returns the number of tensors.

    Args:
        chunks: See `renamed`.
        licence: Of the weights, as their owner decides; None leaves what they say.
    """
    teacher = open_trained(source)
    state, meta = teacher.state, teacher.meta
    meta = without_paths({**meta, "licence": licence} if licence else meta)
    state = renamed(state, chunks)
    if not with_heads:
        state = {k: v for k, v in state.items() if not k.split(".")[0].endswith("_head")}
    state = {k: v.contiguous().clone() for k, v in state.items()}
    if target.suffix == ".safetensors":
        write_safetensors(target, state, meta)
    elif target.suffix in (".pth", ".pt"):
        save_atomically({"teacher": state, "meta": meta}, target)
    else:
        raise BadInput(f"{target}: write .pth or .safetensors")
    return len(state)


def describe(path: str | Path) -> list[str]:
    """What weights hold, a line each: modules, blocks, width, dtype, where they came from."""
    teacher = open_trained(path)
    state, meta = teacher.state, teacher.meta
    modules: Counter[str] = Counter()
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
    domain = Domain.of_meta(meta.get(DOMAIN), str(path))
    if domain is not None:
        lines.append(f"  trained on {domain.num_scans} scans: {domain.words()}")
        for what, counts in (("modalities", domain.modalities), ("organs", domain.organs)):
            lines += [f"    {what}: {', '.join(f'{k} {n}' for k, n in counts.items())}"] if counts else []
    return lines
