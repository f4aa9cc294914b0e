"""What a method sets, what wins over it, and what does not go with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from dinov2.errors import BadInput
from dinov2.eval import linear3d, segmentation3d
from dinov2.eval.methods.flags import complete
from dinov2.eval.methods.registry import METHODS, find_method
from dinov2.models.encoders import build_encoder

OWN = """from torch import nn
from dinov2.models.vision_transformer import vit_tiny_3d
number = 3
def vit(weights):
    net = vit_tiny_3d(patch_size=4, img_size=16)
    if weights:
        net.load_state_dict(weights)
    return net
def nothing(weights):
    return 5
def module(weights):
    return nn.Linear(1, 1)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_encoders.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


def completed(program: Any, dataset: str, method: str, *words: str) -> argparse.Namespace:
    given = ["--output-dir", "o", "--base-data-dir", "d", "--dataset-name", dataset, "--model-name", method, *words]
    return complete(program.get_args_parser().parse_args(given))


W = ("--pretrained-weights", "w.pt")
ROWS = [  # method, words, data set; then head, whole network, edge, cases a step, rate
    ("3DINO", W, "BTCV", ("ViTAdapterUNETR", False, 112, 2, 1e-4)),
    ("3DINO", (*W, "--train-feature-model"), "BTCV", ("ViTAdapterUNETR", True, 112, 2, 1e-4)),
    ("3DINO", (*W, "--segmentation-head", "Linear"), "BraTS", ("Linear", False, 112, 4, 1e-3)),
    ("MONAI-ViT", W, "BraTS", ("ViTAdapterUNETR", False, 96, 2, 1e-4)),
    ("Random", (), "BTCV", ("UNETR", True, 112, 2, 1e-4)),
    ("Random", ("--segmentation-head", "Linear"), "BTCV", ("Linear", False, 112, 4, 1e-3)),
    ("SwinRandom", (), "BTCV", ("SwinUNETR", True, 96, 2, 1e-4)),
    ("SwinTransfer", W, "BraTS", ("SwinUNETR", True, 96, 1, 1e-4)),
    ("own_encoders:vit", ("--pretrained-weights", "random"), "BTCV", ("Linear", False, 16, 4, 1e-3)),
    ("SwinTransfer", (*W, "--image-size", "64", "--batch-size", "7", "--learning-rate", "3e-4"), "BraTS",
     ("SwinUNETR", True, 64, 7, 3e-4)),
]  # fmt: skip


@pytest.mark.parametrize(("method", "words", "dataset", "expected"), ROWS)
def test_a_method_sets_what_is_not_given(method: str, words: tuple[str, ...], dataset: str, expected: tuple[Any, ...]) -> None:
    args = completed(segmentation3d, dataset, method, *words)
    found = args.segmentation_head, args.train_feature_model, args.image_size, args.batch_size, args.learning_rate
    assert found == expected
    assert args.pretrained_weights == (words[1] if "--pretrained-weights" in words else "random")


def test_the_probe_takes_a_methods_input_size() -> None:
    assert completed(linear3d, "ICBM", "SwinTransfer", *W).image_size == 96
    assert completed(linear3d, "ICBM", "3DINO", *W).image_size == 112
    assert not find_method("SwinTransfer").pooled and find_method("3DINO").pooled


BAD = [
    (segmentation3d, "SwinTransfr", W, "no such method (did you mean 'SwinTransfer'?): one of 3DINO, MONAI-ViT, "),
    (segmentation3d, "SwinTransfer", (), "SwinTransfer: needs published self-supervised weights (MONAI's model_swinvit.pt)"),
    (segmentation3d, "SwinTransfer", ("--pretrained-weights", "random"), "needs published self-supervised weights"),
    (segmentation3d, "MONAI-ViT", ("--pretrained-weights", "vit_large_3d"), "MONAI-ViT: needs weights: give"),
    (segmentation3d, "3DINO", (), "3DINO: needs weights: give --pretrained-weights FILE, or random"),
    (segmentation3d, "UNet", W, "UNet: starts from nothing, not from --pretrained-weights w.pt: leave them out"),
    (segmentation3d, "Random", W, "Random: starts from nothing"),
    (segmentation3d, "SwinRandom", ("--pretrained-weights", "vit_tiny_3d"), "SwinRandom: starts from nothing"),
    (segmentation3d, "SwinRandom", ("--segmentation-head", "Linear"), "SwinRandom has SwinUNETR, its last map is 3 voxels"),
    (segmentation3d, "3DINO", (*W, "--segmentation-head", "DynUNet"), "3DINO has ViTAdapterUNETR or UNETR or Linear: leave"),
    (segmentation3d, "own_encoders:vit", (*W, "--train-feature-model"), "own_encoders:vit is used frozen"),
    (linear3d, "UNet", (), "UNet: has no feature for a classification: use 3DINO, MONAI-ViT, Random, SwinTransfer or module"),
    (linear3d, "SwinRandom", (), "SwinRandom: has no feature for a classification"),
    (linear3d, "SwinTransfer", (*W, "--fine-tune"), "--fine-tune: SwinTransfer is probed frozen"),
]  # fmt: skip


@pytest.mark.parametrize(("program", "method", "words", "message"), BAD)
def test_what_does_not_go_together_is_one_line(program: Any, method: str, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        completed(program, "BTCV" if program is segmentation3d else "ICBM", method, *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


ENCODERS = {
    "no_such_module:f": "no_such_module cannot be imported",
    "own_encoders:vitt": "own_encoders has no function vitt (did you mean 'vit'?)",
    "own_encoders:number": "own_encoders has no function number",
    "own_encoders:nothing": "returned a int, expected an nn.Module with embed_dim, patch_size",
    "own_encoders:module": "its network has no embed_dim, patch_size, num_layers",
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_that_cannot_be_used_is_one_line(name: str) -> None:
    with pytest.raises(BadInput) as caught:
        build_encoder(name, {}, "random")
    assert ENCODERS[name] in str(caught.value)


def test_weights_that_an_encoder_does_not_take_are_one_line() -> None:
    import torch

    with pytest.raises(BadInput, match=r"own_encoders:vit: does not take weights w.pth \(RuntimeError: .*Missing key"):
        build_encoder("own_encoders:vit", {"a": torch.zeros(1)}, "w.pth")
    with pytest.raises(BadInput, match="hold NaN"):
        build_encoder("own_encoders:vit", {"a": torch.full((1,), torch.nan)}, "w.pth")


def test_every_method_says_what_it_is() -> None:
    assert list(METHODS) == ["3DINO", "MONAI-ViT", "Random", "SwinRandom", "SwinTransfer", "UNet"]
    help_text = " ".join(segmentation3d.get_args_parser().format_help().split())
    assert all(m.what in help_text for m in METHODS.values()) and "wins over the method's value" in help_text


def test_an_encoders_lack_of_memory_is_no_fault_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (tmp_path / "greedy_encoders.py").write_text(
        'import torch\n\ndef cpu(state):\n    raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")\n\n'
        "def gpu(state):\n    raise torch.OutOfMemoryError('CUDA out of memory')\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, kind in (("cpu", RuntimeError), ("gpu", torch.OutOfMemoryError)):
        with pytest.raises(kind, match="memory"):
            build_encoder(f"greedy_encoders:{name}", {}, "w.pth")
