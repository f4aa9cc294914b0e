"""The index of a torch.distributed.checkpoint folder (`.metadata`), which is a pickle: read without running anything.

torch reads it with `pickle.load`, so that a folder from elsewhere could run code as soon as it is looked into.
"""

from __future__ import annotations

import math
import pickle
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from dinov2.errors import BadInput

_DTYPES = {str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype)}
_ALLOWED = {  # whole names: what a module's name begins with says nothing of what its functions do
    *(("torch", name) for name in (*_DTYPES, "Size")),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}  # fmt: skip
_PATHS = {  # of the machine that wrote it; not used. Python 3.13 names another module than those before and after it.
    (module, kind + name): path
    for module in ("pathlib", "pathlib._local")
    for kind in ("", "Pure")
    for name, path in (("PosixPath", PurePosixPath), ("WindowsPath", PureWindowsPath))
}


def _member(cls: type, name: str) -> Enum:
    """What Python up to 3.11.3 writes a member of an enumeration as: `getattr` of its class and its name."""
    if not (isinstance(cls, type) and issubclass(cls, Enum) and name in cls.__members__):
        raise pickle.UnpicklingError(f"its index names an attribute of {cls!r}, which no checkpoint needs")
    return cls.__members__[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) in _PATHS:
            return _PATHS[module, name]
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"its index names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint folder, whose index can hold nothing but what describes tensors.

    Reading raises `pickle.UnpicklingError` where it names anything else.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            UnpicklingError: It is none, or holds other objects.
        """
        with Path(self.path, ".metadata").open("rb") as file:
            index = _Unpickler(file).load()
        if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
            raise pickle.UnpicklingError("its index is none of a checkpoint")
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


def saved_tensors(reader: SafeReader, path: Path, prefix: str = "") -> dict[str, TensorStorageMetadata]:
    """What a checkpoint's index says of its tensors, those whose names begin with `prefix`.

    Raises:
        BadInput: An entry of such a name is no tensor, so that another program wrote it.
        EOFError: They would take more bytes than its files have.
    """
    tensors = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if not name.startswith(prefix):
            continue
        if not isinstance(entry, TensorStorageMetadata):
            raise BadInput(f"{path}: its entry {name} is no tensor: use a checkpoint that train3d.py wrote")
        tensors[name] = entry
    claimed = sum(math.prod(t.size) * t.properties.dtype.itemsize for t in tensors.values())
    held = sum(p.stat().st_size for p in path.glob("*.distcp"))
    if claimed > held:
        raise EOFError(f"its index names tensors of {claimed} bytes, its files have {held}")
    return tensors
