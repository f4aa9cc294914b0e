"""Work of a build that a process does not survive, in a module of its own: each process imports it anew."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from dinov2.data.cache import commands
from dinov2.data.datalist import Entry

build_in_worker = commands._build_in_worker


def build_but_a(folder: Path, max_gb: float | None, entry: Entry) -> commands.Built:
    """As the command's own; the process that comes to `a.nii` ends there, as by a crash of a library."""
    if entry.image.endswith("a.nii"):
        os.kill(os.getpid(), signal.SIGKILL)
    return build_in_worker(folder, max_gb, entry)
