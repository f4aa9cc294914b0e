"""Which implementation of the operators is in use: the compiled module of `csrc/`, or plain PyTorch."""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path

import torch

PREFIX = "_C_torch_"
REINSTALL = "scripts/install, or pip install --no-build-isolation ., compiles them"


@lru_cache(maxsize=1)
def compiled_operators() -> tuple[bool, str]:
    """Load the compiled operators where they are.

    Returns:
        Whether `torch.ops.dinov2.*` is there, and what to say about it: which module, or why not and what to do.
    """
    release = torch.__version__.split("+")[0].replace(".", "_")
    built = sorted(p.name.split(".")[0] for p in Path(__file__).parents[1].glob(f"{PREFIX}*.so"))
    if PREFIX + release not in built:
        if not built:
            return False, f"not compiled: {REINSTALL}"
        others = ", ".join(name.removeprefix(PREFIX).replace("_", ".") for name in built)
        return False, f"compiled for torch {others}, this is {torch.__version__}: {REINSTALL}"
    try:
        importlib.import_module(f"dinov2.{PREFIX}{release}")
    except ImportError as err:
        return False, f"cannot be loaded ({str(err).splitlines()[0]}): {REINSTALL}"
    return True, f"dinov2.{PREFIX}{release}"
