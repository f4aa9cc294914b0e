"""Dtype rules, pinned."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from dinov2.distributed import precision
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.fsdp.parallel import resolve_strategy

B16, H16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def configured(student: str, teacher: str) -> OmegaConf:
    sides = {
        side: {"backbone": {"mixed_precision": {"param_dtype": d}}} for side, d in (("student", student), ("teacher", teacher))
    }
    return OmegaConf.create({"compute_precision": sides})


@pytest.mark.parametrize(
    ("name", "device", "training", "evaluation"),
    [
        ("fp64", "cpu", F64, F64), ("fp64", "cuda", F64, F64), ("fp32", "cpu", F32, F32), ("fp32", "cuda", F32, F32),
        ("bf16", "cpu", B16, F32), ("bf16", "cuda", B16, B16), ("fp16", "cpu", F32, F32), ("fp16", "cuda", H16, H16),
    ],
)  # fmt: skip
def test_what_a_configured_name_computes_in(name: str, device: str, training: torch.dtype, evaluation: torch.dtype) -> None:
    cfg = configured(name, name)
    assert precision.training_dtype(cfg.compute_precision.student.backbone, device) == training
    assert precision.evaluation_dtype(cfg, device) == evaluation
    assert precision.crop_dtype(cfg, device) == training


def test_crops_are_float32_where_the_two_backbones_differ() -> None:
    assert precision.crop_dtype(configured("fp16", "bf16"), "cuda") == F32
    assert precision.crop_dtype(configured("bf16", "bf16"), "cuda") == B16


@pytest.mark.parametrize(("dtype", "product"), [(B16, B16), (H16, H16), (F32, F32), (F64, F32)])
def test_autocast_changes_products_for_half_precisions_alone(dtype: torch.dtype, product: torch.dtype) -> None:
    a = torch.ones(2, 2)
    with precision.autocast("cpu", dtype):
        assert (a @ a).dtype == product


def test_only_float16_on_a_gpu_has_a_loss_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: asked.setdefault((device, enabled), enabled))
    enabled = [precision.grad_scaler(*args) for args in (("cuda", H16), ("cuda", H16, False), ("cuda", B16), ("cpu", H16))]
    assert enabled == [True, False, False, False]


def test_half_precisions_are_summed_in_float32() -> None:
    assert [precision.at_least_fp32(torch.ones(1, dtype=d)).dtype for d in (B16, H16, F32, F64)] == [F32, F32, F32, F64]


def test_sharding_on_cpus_is_refused_where_torchs_own_code_for_it_needs_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(device=torch.device("cpu"), world_size=2)
    assert resolve_strategy("fsdp", runtime) == "fsdp"
    monkeypatch.delattr(torch.cpu.Stream, "record_event")
    assert resolve_strategy("auto", runtime) == "ddp"
    with pytest.raises(BadInput, match="train.strategy=fsdp: on CPUs it needs a newer torch than .*: use ddp"):
        resolve_strategy("fsdp", runtime)
