"""Files of weights, written whole or not at all; without checkpoint folders, whose import takes a second few programs need."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from dinov2.files import replacing, writing

CHECKSUMS = "checksums.json"  # of a checkpoint's folder


def save_atomically(obj: Any, path: Path) -> None:
    """`torch.save` to a temporary name, then rename."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # torch's own file writer hides a full disk behind a RuntimeError
        torch.save(obj, buffer)
        with replacing(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
