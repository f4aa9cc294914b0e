"""safetensors files with a checksum of all that they say, which the format itself has none of."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.errors import BadInput
from dinov2.files import replacing, writing

StateDict = dict[str, Tensor]
_META, _CHECKSUM = "meta", "crc32"  # keys of the file's metadata


def write_safetensors(path: Path, state: StateDict, meta: dict[str, Any]) -> None:
    """Write tensors and what they say of themselves (plain JSON types), whole or not at all.

    Raises:
        BadInput: The file cannot be written.
    """
    from safetensors.torch import save

    text = json.dumps(meta)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            said = {"format": "pt", _META: text, _CHECKSUM: _checksum(state, text)}  # the first is for transformers
            temporary.write_bytes(save(state, said))


def read_safetensors(path: Path) -> tuple[StateDict, dict[str, Any]]:
    """Tensors and meta; a file of another program has neither meta nor a checksum.

    Raises:
        BadInput: Not there, not such a file, or not what was written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            meta = json.loads(said.get(_META, "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    except FileNotFoundError as err:
        raise BadInput(f"weights {path}: no such file") from err
    except (OSError, SafetensorError, ValueError, RecursionError) as err:
        raise BadInput(f"{path}: not a readable safetensors file ({str(err).splitlines()[0][:120]})") from err
    if _CHECKSUM in said and said[_CHECKSUM] != _checksum(state, said.get(_META, "{}")):
        raise BadInput(f"weights {path}: damaged, it does not match its checksum: copy or write it again")
    return state, meta if isinstance(meta, dict) else {}


def _checksum(state: StateDict, text: str) -> str:
    """CRC-32 of names, dtypes, shapes and values, whatever their order in the file, and of a text."""
    value = zlib.crc32(text.encode())
    for name, tensor in sorted(state.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
