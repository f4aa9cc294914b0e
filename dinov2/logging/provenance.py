"""What decided a result: versions, git state, command, data; written beside it."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dinov2.version import __version__

RUN_FILE = "run.json"
_PACKAGES = ("monai", "numpy", "nibabel", "omegaconf")


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that numbers depend on."""
    # torch's own word says which build it is, as +cu130; the package's metadata do so for some builds only
    found = {"dinov2-3d": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_state() -> dict[str, Any] | None:
    """Commit and whether the checkout differs from it; None where the package is not in a git checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        run = [
            subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True).stdout
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": run[0].strip(), "modified": bool(run[1].strip())}


def run_record(datalist_sha256: str, num_volumes: int, effective_batch: int, layout: dict[str, Any]) -> dict[str, Any]:
    """Everything beside the configuration that a result depends on."""
    return {
        "command": sys.argv,
        "versions": versions(),
        "git": git_state(),
        "datalist_sha256": datalist_sha256,
        "num_volumes": num_volumes,
        "effective_batch": effective_batch,
        "layout": layout,
        "num_threads": torch.get_num_threads(),
    }
