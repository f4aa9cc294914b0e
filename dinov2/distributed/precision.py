"""Which dtype a computation uses: every rule in one place.

| configured | training multiplies in | evaluation multiplies in |
| --- | --- | --- |
| fp64 | float64 | float64 |
| fp32 | float32 | float32 |
| bf16 | bfloat16 | bfloat16 on a GPU, float32 on a CPU, where it would be slower |
| fp16 | float16 on a GPU, with a loss scaler; float32 on a CPU | float16 on a GPU, float32 on a CPU |
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from omegaconf import DictConfig
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
HALF = (torch.float16, torch.bfloat16)


def training_dtype(precision: DictConfig, device_type: str) -> torch.dtype:
    """What a module multiplies in while it is trained; `precision` is `compute_precision.<side>.<module>`."""
    dtype = DTYPES[precision.mixed_precision.param_dtype]
    return torch.float32 if dtype == torch.float16 and device_type == "cpu" else dtype


def module_precision(cfg: DictConfig, side: str, module: str) -> DictConfig:
    """`compute_precision.<side>.<module>`; heads that have no keys of their own go by `dino_head`'s."""
    of_side = cfg.compute_precision[side]
    return of_side.get(module, of_side.dino_head)


def evaluation_dtype(cfg: DictConfig, device_type: str) -> torch.dtype:
    """What a frozen or fine-tuned backbone multiplies in: as the teacher's, half precisions on a GPU only."""
    dtype = training_dtype(cfg.compute_precision.teacher.backbone, device_type)
    return torch.float32 if dtype in HALF and device_type == "cpu" else dtype


def autocast(device_type: str, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Matrix products in `dtype` where it is a half precision; otherwise nothing changes."""
    half = dtype in HALF
    return torch.autocast(device_type, dtype=dtype if half else None, enabled=half)


def evaluation_autocast(cfg: DictConfig, device_type: str) -> AbstractContextManager[None]:
    """Around passes of a backbone that is evaluated."""
    return autocast(device_type, evaluation_dtype(cfg, device_type))


def grad_scaler(device_type: str, dtype: torch.dtype, wanted: bool = True) -> torch.amp.GradScaler:
    """The loss scaler that float16 on a GPU needs; one that does nothing elsewhere."""
    return torch.amp.GradScaler(device_type, enabled=wanted and device_type == "cuda" and dtype == torch.float16)


def crop_dtype(cfg: DictConfig, device_type: str) -> torch.dtype:
    """What crops are handed over in: the dtype that both backbones multiply in, float32 where they differ.

    For a half precision the patch embedding would round them to it anyway; half the bytes pass through shared memory and to
    the device.
    """
    dtypes = {training_dtype(cfg.compute_precision[side].backbone, device_type) for side in ("student", "teacher")}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def fastest_dtype(device: torch.device) -> torch.dtype:
    """For features alone: bfloat16 on CUDA (float16 where it has none), float32 elsewhere."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precisions become float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
