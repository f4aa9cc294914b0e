"""An ONNX file computes what the network computes, for any number of volumes."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from omegaconf import DictConfig

from dinov2 import load_encoder
from dinov2.cli import main
from dinov2.errors import BadInput
from dinov2.sharing.onnx_file import write_onnx
from tests.unit.sharing.test_transformers_folder import save_weights


def test_onnxruntime_gives_the_same_tokens_for_any_batch(
    tmp_path: Path, small_config: Callable[..., DictConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["student.pos_encoding=learned", "student.num_register_tokens=2", "student.ffn_layer=swiglufused"]
    weights, target = save_weights(small_config(*words), tmp_path / "w.pth"), tmp_path / "w.onnx"
    flags = ["--onnx", str(target), "--size", "16", "20", "12", "--licence", "MIT"]
    assert main(["checkpoint", "export", str(weights), *flags]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and "torchvision" not in said.err and [*tmp_path.iterdir()].count(target) == 1
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["licence"] == "MIT" and facts["patch_grid"] == "[4, 5, 3]" and "percentiles" in facts["preprocessing"]
    encoder = load_encoder(weights, "cpu", dtype="fp32")
    for num in (1, 3):
        volumes = torch.rand(num, 1, 16, 20, 12, generator=torch.Generator().manual_seed(num)) * 2 - 1
        cls, patches = session.run(None, {"pixel_values": volumes.numpy()})
        wanted = encoder(volumes)
        np.testing.assert_allclose(cls, wanted.cls, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(patches, wanted.patch.flatten(1, 3), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_written_is_said_before_anything_is_computed(
    tmp_path: Path, small_config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, target = save_weights(small_config(), tmp_path / "w.pth"), tmp_path / "w.onnx"
    with pytest.raises(BadInput, match="--size 16 18 16: each must be a multiple of the network's patch size 4"):
        write_onnx(weights, target, (16, 18, 16), "MIT")
    with pytest.raises(BadInput, match="--licence NAME"):
        write_onnx(weights, target)
    whole = builtins.__import__

    def without_onnx(name: str, *args: object, **kwargs: object) -> object:
        if name == "onnx":
            raise ModuleNotFoundError(name, name=name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(BadInput, match="--onnx needs onnx, which is not installed: pip install .dinov2-3d\\[share\\]"):
        write_onnx(weights, target, None, "MIT")
    assert not target.exists()
