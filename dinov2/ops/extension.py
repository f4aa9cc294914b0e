"""Which implementation of the operators is in use: the compiled modules of `csrc/`, or plain PyTorch."""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path

import torch

PREFIX = "_C_torch_"
CUDA_PREFIX = "_C_cuda_torch_"
REINSTALL = "scripts/install, or pip install --force-reinstall --no-deps . in the repository, compiles them"
CUDA_REINSTALL = "FORCE_CUDA=1 pip install . says what is missing"


@lru_cache(maxsize=1)
def compiled_operators() -> tuple[bool, str]:
    """Load the compiled operators where they are.

    Returns:
        Whether `torch.ops.dinov2.*` is there, and what to say about it: which module, or why not and what to do.
    """
    return _load(PREFIX, REINSTALL)


@lru_cache(maxsize=1)
def cuda_kernels() -> tuple[bool, str]:
    """Load the CUDA kernels of the operators where they are; as `compiled_operators`."""
    is_compiled, what = compiled_operators()  # declares the operators that the kernels join
    return _load(CUDA_PREFIX, CUDA_REINSTALL) if is_compiled else (False, what)


def implementation(device_type: str) -> tuple[bool, str]:
    """Whether deformable attention is compiled for `cpu`, `cuda`, ..., and what to say about it."""
    if device_type == "cpu":
        return compiled_operators()
    return cuda_kernels() if device_type == "cuda" else (False, f"there is no kernel for {device_type}")


def _load(prefix: str, advice: str) -> tuple[bool, str]:
    release = torch.__version__.split("+")[0].replace(".", "_")
    built = sorted(p.name.split(".")[0] for p in Path(__file__).parents[1].glob(f"{prefix}*.so"))
    if prefix + release not in built:
        if not built:
            return False, f"not compiled: {advice}"
        others = ", ".join(name.removeprefix(prefix).replace("_", ".") for name in built)
        return False, f"compiled for torch {others}, this is {torch.__version__}: {advice}"
    try:
        importlib.import_module(f"dinov2.{prefix}{release}")
    except ImportError as err:
        return False, f"cannot be loaded ({str(err).splitlines()[0]}): {advice}"
    return True, f"dinov2.{prefix}{release}"
