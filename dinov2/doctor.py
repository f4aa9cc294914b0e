"""What this machine has: versions, device, optional parts; and what each missing one means."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

import torch

from dinov2.data.volumes.formats import FORMATS
from dinov2.logging.provenance import git_state, versions
from dinov2.ops import compiled_operators, cuda_kernels
from dinov2.optional import EXTRAS, install_words
from dinov2.version import __version__

_OPTIONAL = {
    "xformers": "attention over crops of several sizes in one call on CUDA; without it one SDPA call per size",
    "blosc2": "compressed cache files; without it they take twice the space",
    "monai": "the reference augmentation (train.augmentation=monai)",
    "nilearn": "the quick start's built-in template; without it use `dinov2 demo --data FOLDER`",
    "matplotlib": "pictures and pages",
    "statannotations": "marks of significance in figures",
    "submitit": "SLURM jobs",
    "onnx": "ONNX files of weights",
    "tensorboard": "curves while training",
    **{
        package: "reads " + ", ".join(f.name for f in FORMATS if package in f.needs)
        for package in sorted({package for f in FORMATS for package in f.needs}, reverse=True)
    },
}


def report() -> str:
    """Several lines for a person or a bug report; no user names or paths but the package's own."""
    lines = [f"dinov2-3d {__version__} in {Path(__file__).parent}"]
    lines += [f"  {name:14} {version}" for name, version in versions().items() if name != "dinov2-3d"]
    git = git_state()
    lines.append(
        f"  {'git':14} {git['commit'][:12] + (' with changes' if git['modified'] else '') if git else 'not a checkout'}"
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk_gib = shutil.disk_usage(".").free / 2**30
    lines.append(
        f"machine: {platform.system()} {platform.machine()}, {os.cpu_count()} cores ({torch.get_num_threads()} torch threads), "
        f"{memory_gib:.0f} GiB memory, {disk_gib:.0f} GiB free here"
    )
    lines.append(_device_line())
    is_compiled, what = compiled_operators()
    lines.append(f"compiled operators: {what if is_compiled else what + '; plain PyTorch does the same, slower'}")
    has_kernels, what = cuda_kernels()
    lines.append(f"deformable attention: CPU {_in_use(is_compiled)}; CUDA {_in_use(has_kernels)} ({what})")
    lines.append("optional parts:")
    for name, meaning in _OPTIONAL.items():
        present = importlib.util.find_spec(name) is not None
        state = importlib.metadata.version(name) if present else "missing"
        cure = f" ({install_words(name)})" if name in EXTRAS and not present else ""
        lines.append(f"  {name:15} {state:10} {meaning}{cure}")
    return "\n".join(lines)


def _in_use(is_compiled: bool) -> str:
    return "compiled" if is_compiled else "plain PyTorch (grid_sample)"


def _device_line() -> str:
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return f"device: CUDA, {torch.cuda.device_count()} x {card.name}, {card.total_memory / 2**30:.0f} GiB each"
    if torch.version.cuda:
        return (
            f"device: CPU; this torch is built for CUDA {torch.version.cuda} but sees no GPU (driver or CUDA_VISIBLE_DEVICES)"
        )
    return "device: CPU; this torch is a CPU-only build"
