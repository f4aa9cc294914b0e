"""Work of `embed` that a process does not survive, in a module of its own: each process imports it anew."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from dinov2.data.datalist import Entry
from dinov2.features import embed
from dinov2.geometry import Spacing

store = embed._store


def store_but_11(load: Any, spacing_mm: Spacing | None, folder: Path, item: tuple[int, Entry]) -> embed.Stored:
    """As the command's own; the process that comes to `11.nii` ends there, as by a crash of a library."""
    if item[1].image.endswith("11.nii"):
        os.kill(os.getpid(), signal.SIGKILL)
    return store(load, spacing_mm, folder, item)
